//! The safetensors format: eight bytes with the length of a JSON header, the header, then the
//! tensors' data without gaps.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::unique::Unique;
use crate::data_file::DataFile;
use crate::{GgmlType, ModelError, TensorInfo};

/// Of the header, as in the format's own definition.
const MAX_HEADER: u64 = 100_000_000;
/// The length field before the header.
const LENGTH_BYTES: u64 = 8;

/// One safetensors file.
#[derive(Debug)]
pub(super) struct Safetensors {
    pub(super) file: DataFile,
    /// In order of their data; names as in the file.
    pub(super) tensors: Vec<TensorInfo>,
}

/// A header entry.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    /// The contiguous dimension last.
    shape: Vec<u64>,
    /// Begin and end, from the start of the data.
    data_offsets: (u64, u64),
}

/// `__metadata__` is a map of strings, anything else a tensor.
#[derive(Deserialize)]
#[serde(untagged)]
enum Item {
    Tensor(Entry),
    Other(IgnoredAny),
}

impl Safetensors {
    /// Reads and checks the header. `index` counts the checkpoint's files.
    ///
    /// # Errors
    /// When the file can't be read, its parts contradict each other or its size, or it holds numbers
    /// that are not floats of 16 or 32 bits.
    pub(super) fn open(path: &Path, index: usize) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io {
            file: path.to_owned(),
            source,
        };
        let refuse = |offset: u64, problem: String| ModelError::Format {
            file: path.to_owned(),
            offset,
            problem,
        };
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        if size < LENGTH_BYTES {
            let problem = format!("not a safetensors file: it has {size} bytes");
            return Err(refuse(0, problem));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        let left = size - LENGTH_BYTES;
        if length > left.min(MAX_HEADER) {
            return Err(refuse(
                0,
                format!(
                    "a header of {length} bytes, but {left} follow and {MAX_HEADER} are allowed; \
                     the file may be cut short"
                ),
            ));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let Unique(items) = serde_json::from_slice::<Unique<Item>>(&header).map_err(|e| {
            // Headers are one line: the column is the place.
            let place = if e.line() == 1 { e.column() } else { 0 };
            refuse(LENGTH_BYTES + place as u64, format!("the header: {e}"))
        })?;
        let data = (LENGTH_BYTES + length, left - length);
        let tensors = check(items, data, index).map_err(|(at, problem)| refuse(at, problem))?;
        Ok(Self {
            file: DataFile::new(path, file, size),
            tensors,
        })
    }
}

/// Turns entries into tensors, which must fill the data (start and length) exactly. An error comes
/// with its place in the file.
fn check(
    items: Vec<(String, Item)>,
    (start, length): (u64, u64),
    file: usize,
) -> Result<Vec<TensorInfo>, (u64, String)> {
    let mut tensors = Vec::with_capacity(items.len());
    for (name, item) in items {
        match item {
            Item::Other(_) if name == "__metadata__" => {}
            Item::Other(_) => {
                let problem = "has no dtype, shape and data_offsets, or they are malformed";
                return Err((LENGTH_BYTES, format!("tensor `{name}` {problem}")));
            }
            Item::Tensor(entry) => {
                let info = tensor(name, entry, file).map_err(|e| (LENGTH_BYTES, e))?;
                tensors.push(info);
            }
        }
    }
    // One without elements comes before the one that begins at the same place.
    tensors.sort_by_key(|t| (t.offset, t.bytes));
    let mut end = 0;
    for tensor in &mut tensors {
        if tensor.offset != end {
            let problem = format!(
                "the data of tensor `{}` begins at {}, but the data before it ends at {end}",
                tensor.name, tensor.offset
            );
            return Err((LENGTH_BYTES, problem));
        }
        end += tensor.bytes as u64;
        tensor.offset += start;
        if end > length {
            let problem = format!(
                "tensor `{}` ends at byte {} of the file, which has {}; it may be cut short",
                tensor.name,
                start.saturating_add(end),
                start + length
            );
            return Err((start + length, problem));
        }
    }
    if end != length {
        let problem = format!("{} bytes follow the last tensor", length - end);
        return Err((start + end, problem));
    }
    Ok(tensors)
}

/// Its offset is still relative to the data.
fn tensor(name: String, entry: Entry, file: usize) -> Result<TensorInfo, String> {
    let (ggml_type, width) = match entry.dtype.as_str() {
        "F32" => (GgmlType::F32, 4),
        "F16" => (GgmlType::F16, 2),
        "BF16" => (GgmlType::BF16, 2),
        other => {
            return Err(format!(
                "tensor `{name}` has the dtype {other}; supported are F32, F16 and BF16"
            ));
        }
    };
    let (begin, end) = entry.data_offsets;
    let mut sizes = entry.shape.iter();
    let bytes = sizes.try_fold(width, |bytes: u64, &size| bytes.checked_mul(size));
    match (bytes, end.checked_sub(begin)) {
        (Some(bytes), Some(got)) if bytes == got => Ok(TensorInfo {
            name,
            dims: entry.shape.into_iter().rev().collect(),
            ggml_type,
            file,
            offset: begin,
            bytes: usize::try_from(bytes).map_err(|e| e.to_string())?,
        }),
        _ => Err(format!(
            "tensor `{name}`: {} of the shape {:?} don't take the bytes from {begin} to {end}",
            entry.dtype, entry.shape
        )),
    }
}
