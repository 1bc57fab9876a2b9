use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{ModelError, TensorInfo};

/// An open file that tensors are read from.
#[derive(Debug)]
pub(crate) struct DataFile {
    path: PathBuf,
    file: File,
    /// When it was opened.
    size: u64,
}

impl DataFile {
    pub(crate) fn new(path: &Path, file: File, size: u64) -> Self {
        Self {
            path: path.to_owned(),
            file,
            size,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `out` with the bytes of a tensor in this file from `start` on.
    pub(crate) fn read_at(
        &self,
        tensor: &TensorInfo,
        start: usize,
        out: &mut [u8],
    ) -> Result<(), ModelError> {
        assert!(start <= tensor.bytes && out.len() <= tensor.bytes - start);
        self.file
            .read_exact_at(out, tensor.offset + start as u64)
            .map_err(|source| match source.kind() {
                ErrorKind::UnexpectedEof => ModelError::Format {
                    file: self.path.clone(),
                    offset: tensor.offset,
                    problem: format!("the file shrank: tensor `{}` is cut", tensor.name),
                },
                _ => ModelError::Io {
                    file: self.path.clone(),
                    source,
                },
            })
    }
}
