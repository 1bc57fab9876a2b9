use spate_model::{Loader, MatrixSource};

use crate::linear::LinearWeight;
use crate::{CpuError, CpuMode, ThreadPool};

/// One linear map, or several that read the same input.
///
/// The outputs of stacked maps lie one map after another: `[tokens, rows of the first]`, then
/// `[tokens, rows of the second]` and so on.
pub(crate) struct Matrix {
    pub(crate) parts: Vec<LinearWeight>,
    pub(crate) bias: Option<Vec<f32>>,
}

impl Matrix {
    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> u64 {
        let parts: usize = self.parts.iter().map(LinearWeight::bytes).sum();
        (parts + self.bias.as_deref().map_or(0, size_of_val)) as u64
    }
}

/// Converts weights to the form that the mode computes with.
pub(crate) struct CpuLoader {
    mode: CpuMode,
    /// Of one thread: the loader is called from many.
    pool: ThreadPool,
}

impl CpuLoader {
    pub(crate) fn new(mode: CpuMode) -> Result<Self, CpuError> {
        let pool = ThreadPool::new(1).map_err(CpuError::Thread)?;
        Ok(Self { mode, pool })
    }
}

impl Loader for CpuLoader {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Error = CpuError;

    fn matrix(&self, source: MatrixSource<'_>) -> Result<Matrix, CpuError> {
        let convert = match self.mode {
            CpuMode::Exact => LinearWeight::exact,
            CpuMode::Fast => LinearWeight::fast,
        };
        let parts = source.parts.iter().map(|part| {
            let shape = (part.rows, source.cols);
            let bytes = part.read().map_err(CpuError::Model)?;
            convert(part.ggml_type, shape, &bytes, &self.pool).map_err(CpuError::Quant)
        });
        Ok(Matrix {
            parts: parts.collect::<Result<_, _>>()?,
            bias: source.bias,
        })
    }

    fn vector(&self, source: &[f32]) -> Result<Vec<f32>, CpuError> {
        Ok(source.to_vec())
    }
}
