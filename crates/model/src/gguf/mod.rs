//! GGUF version 3: metadata, vocabulary and tensors, in one file or several.
//!
//! A header is read once, with every length and count compared with the size of the file before
//! anything of that size is allocated.

mod config;
mod metadata;
mod reader;
mod split;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::Path;

pub use metadata::{Array, Metadata, Value};
use reader::Reader;

use crate::data_file::DataFile;
use crate::quant::GgmlType;
use crate::{Checkpoint, ModelConfig, ModelError, TensorInfo};

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;
const DEFAULT_ALIGNMENT: u32 = 32;
const MAX_ALIGNMENT: u32 = 1 << 20;
const MAX_DIMS: u32 = 4;

/// An open GGUF model.
#[derive(Debug)]
pub struct Gguf {
    /// At least one; the first holds the metadata.
    files: Vec<DataFile>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

impl Gguf {
    /// Reads and checks the header, and those of the other files if the model is split: then `path`
    /// is the first, and the others are found by their names.
    ///
    /// # Errors
    /// When a file is missing or can't be read, is not GGUF version 3, or any field contradicts the
    /// size of the file or another field.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let first = Header::read(path)?;
        let others = split::read_others(path, &first)?;
        let mut gguf = Self {
            files: vec![first.file],
            metadata: first.metadata,
            tensors: first.tensors,
        };
        for header in others {
            gguf.files.push(header.file);
            gguf.tensors.extend(header.tensors);
        }
        Ok(gguf)
    }

    /// The files, the one with the metadata first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(DataFile::path)
    }

    /// Size of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(DataFile::size).sum()
    }

    /// The key-value section.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// `general.architecture`, or an empty string.
    pub fn architecture(&self) -> &str {
        self.text("general.architecture").unwrap_or("")
    }

    /// `general.name`.
    pub fn name(&self) -> Option<&str> {
        self.text("general.name")
    }

    /// `tokenizer.chat_template`: Jinja source.
    pub fn chat_template(&self) -> Option<&str> {
        self.text("tokenizer.chat_template")
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    /// An error about the model in this file.
    pub(crate) fn error(&self, problem: impl Into<String>) -> ModelError {
        (self as &dyn Checkpoint).error(problem)
    }
}

impl Checkpoint for Gguf {
    fn path(&self) -> &Path {
        self.files[0].path()
    }

    fn config(&self) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_gguf(self)
    }

    /// In order of their files and data.
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_at(&self, tensor: &TensorInfo, start: usize, out: &mut [u8]) -> Result<(), ModelError> {
        self.files[tensor.file].read_at(tensor, start, out)
    }
}

/// What one file says.
struct Header {
    file: DataFile,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

impl Header {
    fn read(path: &Path) -> Result<Self, ModelError> {
        let mut r = Reader::open(path)?;
        if r.bytes("magic number")? != MAGIC {
            return Err(r.error(0, "not a GGUF file (it does not begin with `GGUF`)"));
        }
        match r.u32("version")? {
            VERSION => {}
            v if v.swap_bytes() == VERSION => {
                return Err(r.error(4, "big-endian GGUF is not supported"));
            }
            v => {
                return Err(r.error(
                    4,
                    format!("GGUF version {v} is not supported, only {VERSION}"),
                ));
            }
        }
        // Shortest possible tensor: name length, dimension count, one dimension, type, offset.
        let tensor_count = r.count(8 + 4 + 8 + 4 + 8, "tensor count")?;
        // Shortest possible pair: key length, type, one byte.
        let pair_count = r.count(8 + 4 + 1, "metadata count")?;
        let metadata = Metadata::read(&mut r, pair_count, path.to_owned())?;
        let alignment = alignment(&metadata, &r)?;
        let tensors = read_tensors(&mut r, tensor_count, alignment)?;
        let size = r.size;
        Ok(Self {
            file: DataFile::new(path, r.into_file(), size),
            metadata,
            tensors,
        })
    }
}

fn alignment(metadata: &Metadata, r: &Reader) -> Result<u64, ModelError> {
    let alignment = metadata
        .get_u32("general.alignment")?
        .unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
        return Err(r.error(
            r.offset,
            format!("general.alignment {alignment} is not a power of two in 8..={MAX_ALIGNMENT}"),
        ));
    }
    Ok(alignment.into())
}

fn read_tensors(
    r: &mut Reader,
    count: usize,
    alignment: u64,
) -> Result<Vec<TensorInfo>, ModelError> {
    let mut tensors = Vec::with_capacity(count);
    let mut header_offsets = Vec::with_capacity(count);
    let mut names = HashSet::with_capacity(count);
    for _ in 0..count {
        let at = r.offset;
        let tensor = read_tensor_info(r, alignment)?;
        if !names.insert(tensor.name.clone()) {
            return Err(r.error(at, format!("tensor `{}` appears twice", tensor.name)));
        }
        tensors.push(tensor);
        header_offsets.push(at);
    }
    let data_start = r.offset.next_multiple_of(alignment);
    for (tensor, &at) in tensors.iter_mut().zip(&header_offsets) {
        let end = data_start
            .checked_add(tensor.offset)
            .and_then(|start| start.checked_add(tensor.bytes as u64));
        if end.is_none_or(|end| end > r.size) {
            return Err(r.error(
                at,
                format!(
                    "tensor `{}`: {} bytes at {data_start} + {} lie beyond the end of the file ({})",
                    tensor.name, tensor.bytes, tensor.offset, r.size
                ),
            ));
        }
        tensor.offset += data_start;
    }
    tensors.sort_by_key(|t| t.offset);
    for (a, b) in tensors.iter().zip(tensors.iter().skip(1)) {
        if a.offset + a.bytes as u64 <= b.offset {
            continue;
        }
        return Err(r.error(
            b.offset,
            format!("the data of tensors `{}` and `{}` overlap", a.name, b.name),
        ));
    }
    Ok(tensors)
}

/// Reads one header entry; `offset` is still relative to the data section.
fn read_tensor_info(r: &mut Reader, alignment: u64) -> Result<TensorInfo, ModelError> {
    let name = r.string("tensor name")?;
    let dims_at = r.offset;
    let n_dims = r.u32("dimension count")?;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(r.error(
            dims_at,
            format!("tensor `{name}` has {n_dims} dimensions, allowed are 1 to {MAX_DIMS}"),
        ));
    }
    let dims = (0..n_dims)
        .map(|_| r.u64("dimension"))
        .collect::<Result<Vec<_>, _>>()?;
    let type_at = r.offset;
    let ggml_type = GgmlType::from_u32(r.u32("tensor type")?)
        .map_err(|e| r.error(type_at, format!("tensor `{name}`: {e}")))?;
    let bytes = byte_size(&dims, ggml_type).ok_or_else(|| {
        r.error(
            dims_at,
            format!(
                "tensor `{name}`: no {ggml_type} tensor has the dimensions {dims:?} (zero, too \
                 large, or the first is no multiple of the block size)"
            ),
        )
    })?;
    let offset_at = r.offset;
    let offset = r.u64("tensor offset")?;
    if !offset.is_multiple_of(alignment) {
        return Err(r.error(
            offset_at,
            format!("tensor `{name}`: offset {offset} is no multiple of the alignment {alignment}"),
        ));
    }
    Ok(TensorInfo {
        name,
        dims,
        ggml_type,
        file: 0,
        offset,
        bytes,
    })
}

fn byte_size(dims: &[u64], ggml_type: GgmlType) -> Option<usize> {
    let (&cols, rest) = dims.split_first()?;
    if dims.contains(&0) {
        return None;
    }
    let row = ggml_type.row_bytes(usize::try_from(cols).ok()?).ok()?;
    let rows = rest.iter().try_fold(1u64, |rows, &d| rows.checked_mul(d))?;
    row.checked_mul(usize::try_from(rows).ok()?)
}
