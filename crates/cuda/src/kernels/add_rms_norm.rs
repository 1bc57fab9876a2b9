use half::bf16;

use super::{VEC, image};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Shape, Slice, Stream};

/// Vectors that a thread keeps in registers.
const MAX_TURNS: usize = 4;

/// `residual += delta`, then `out = residual / rms(residual) * norm`. A delta with a norm of its own
/// is normalised in the same way before.
pub struct AddRmsNorm(Kernel);

impl AddRmsNorm {
    /// The widest row.
    pub const MAX_WIDTH: usize = 1024 * MAX_TURNS * VEC;

    /// Loads the kernel.
    ///
    /// # Errors
    /// When the GPU can't run it.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("add_rms_norm"))?;
        Ok(Self(module.kernel(c"add_rms_norm")?))
    }

    /// `delta` (if there is one), `residual` and `out`: `[tokens, width]`; `norm` and the delta's own
    /// (if it has one): `[width]`.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If the width is not a multiple of 8 up to [`Self::MAX_WIDTH`], or a buffer is too small.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        tokens: usize,
        delta: Option<(Slice<bf16>, Option<Slice<f32>>)>,
        residual: Slice<bf16>,
        norm: Slice<f32>,
        eps: f32,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let width = norm.len();
        assert!(width.is_multiple_of(VEC) && width <= Self::MAX_WIDTH);
        let (delta, delta_norm) = delta.unwrap_or((Slice::null(), None));
        let least = if delta.is_empty() { out } else { delta }.len();
        assert!(delta_norm.is_none_or(|norm| norm.len() == width));
        assert!(least.min(residual.len()).min(out.len()) >= tokens * width);
        // The fewest threads that hold the row in half of the registers: the width alone decides.
        let vectors = width / VEC;
        let threads = vectors.div_ceil(2).next_multiple_of(32).clamp(32, 1024) as u32;
        let shape = Shape::new(tokens as u32, threads);
        let delta_norm = delta_norm.unwrap_or(Slice::null());
        let arguments = (delta, delta_norm, residual, norm, eps, width as u32, out);
        // SAFETY: the types are those of add_rms_norm.cu, the lengths were checked, the caller
        // vouches for the rest.
        unsafe { self.0.launch(stream, shape, &arguments) }
    }
}
