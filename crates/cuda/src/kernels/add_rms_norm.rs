use half::bf16;

use super::{VEC, image};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Shape, Slice, Stream};

/// Most threads of a block.
const THREADS: usize = 1024;

/// `residual += delta`, then `out = residual / rms(residual) * norm`. A delta with a norm of its own
/// is normalised in the same way before.
pub struct AddRmsNorm {
    two: Kernel,
    four: Kernel,
}

impl AddRmsNorm {
    /// The widest row.
    pub const MAX_WIDTH: usize = 4 * THREADS * VEC;

    /// Loads the kernel.
    ///
    /// # Errors
    /// When the GPU can't run it.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("add_rms_norm"))?;
        Ok(Self {
            two: module.kernel(c"add_rms_norm_2")?,
            four: module.kernel(c"add_rms_norm_4")?,
        })
    }

    /// `delta` (if there is one), `residual` and `out`: `[tokens, width]`; `norm` and the delta's own
    /// (if it has one): `[width]`.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run. The norm was complete before the kernel that precedes
    /// this one in the stream was launched.
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
        // Two vectors a thread, four where there are not as many threads: the width alone decides, because
        // the order of the sum depends on it.
        let vectors = width / VEC;
        let threads = vectors.div_ceil(2).next_multiple_of(32).min(THREADS);
        let kernel = match vectors <= 2 * threads {
            true => &self.two,
            false => &self.four,
        };
        let shape = Shape::new(tokens as u32, threads as u32);
        let delta_norm = delta_norm.unwrap_or(Slice::null());
        let arguments = (delta, delta_norm, residual, norm, eps, width as u32, out);
        // SAFETY: the types are those of add_rms_norm.cu, the lengths were checked, the caller
        // vouches for the rest.
        unsafe { kernel.launch(stream, shape, &arguments) }
    }
}
