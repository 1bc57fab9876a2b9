use half::bf16;
use spate_model::Activation;

use super::{VEC, image, striding_grid};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Shape, Slice, Stream};

const THREADS: u32 = 256;

/// `out = activation(gate) * up`.
pub struct ActMul {
    silu: Kernel,
    gelu: Kernel,
}

impl ActMul {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("act_mul"))?;
        Ok(Self {
            silu: module.kernel(c"act_mul_silu")?,
            gelu: module.kernel(c"act_mul_gelu")?,
        })
    }

    /// `gate_up`: `[tokens, 2 * width]`, a row is gate, then up; `out`: `[tokens, width]`.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If the width is not a multiple of 8 or a buffer is too small.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        activation: Activation,
        tokens: usize,
        width: usize,
        gate_up: Slice<bf16>,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        assert!(width.is_multiple_of(VEC));
        assert!(gate_up.len() >= 2 * tokens * width && out.len() >= tokens * width);
        let kernel = match activation {
            Activation::Silu => &self.silu,
            Activation::GeluTanh => &self.gelu,
        };
        let grid = striding_grid(tokens * width / VEC, THREADS, stream.sms());
        let arguments = (gate_up, tokens as u32, width as u32, out);
        // SAFETY: the types are those of act_mul.cu, the lengths were checked, the caller vouches
        // for the rest.
        unsafe { kernel.launch(stream, Shape::new(grid, THREADS), &arguments) }
    }
}
