use std::path::Path;

use crate::{GgmlType, ModelConfig, ModelError};

/// A model on disk, whatever its format: what kind of transformer it is, and its tensors by the
/// names that GGUF files give them (`blk.0.attn_q.weight`).
///
/// Tensors are read on demand, whole or in parts, into memory that the caller owns, never memory-mapped: a file that
/// shrinks or changes is an error while it's loaded and nothing at all afterwards, and no page of it
/// stays resident beside the backend's own copy.
pub trait Checkpoint: Send + Sync {
    /// The file or directory that messages name.
    fn path(&self) -> &Path;

    /// What kind of transformer it is.
    ///
    /// # Errors
    /// When the architecture is unknown, a value is missing or has a wrong type, or the values
    /// contradict each other.
    fn config(&self) -> Result<ModelConfig, ModelError>;

    /// All tensors.
    fn tensors(&self) -> &[TensorInfo];

    /// Fills `out` with a tensor's bytes from byte `start` on. May be called from several threads at
    /// once.
    ///
    /// # Errors
    /// When a file can't be read or has shrunk since it was opened.
    ///
    /// # Panics
    /// If the tensor has fewer bytes.
    fn read_at(&self, tensor: &TensorInfo, start: usize, out: &mut [u8]) -> Result<(), ModelError>;

    /// Appends a tensor's bytes to `out`.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn read(&self, tensor: &TensorInfo, out: &mut Vec<u8>) -> Result<(), ModelError> {
        let start = out.len();
        out.resize(start + tensor.bytes, 0);
        self.read_at(tensor, 0, &mut out[start..])
    }

    /// One tensor by name.
    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors().iter().find(|t| t.name == name)
    }
}

/// What a tensor looks like and where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the checkpoint.
    pub name: String,
    /// Sizes, the contiguous dimension first: a matrix `[rows, cols]` has `dims == [cols, rows]`.
    pub dims: Vec<u64>,
    /// Element format.
    pub ggml_type: GgmlType,
    /// Which of the checkpoint's files holds it, counted from 0.
    pub file: usize,
    /// Of the first byte, from the start of that file.
    pub offset: u64,
    /// Size of the data.
    pub bytes: usize,
}

impl dyn Checkpoint + '_ {
    /// An error about the model in this checkpoint.
    pub(crate) fn error(&self, problem: impl Into<String>) -> ModelError {
        ModelError::Model {
            file: self.path().to_owned(),
            problem: problem.into(),
        }
    }
}
