use super::image;
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Shape, Slice, Stream};

const THREADS: u32 = 256;

/// Writes single words.
pub struct Scatter(Kernel);

impl Scatter {
    /// Loads the kernel.
    ///
    /// # Errors
    /// When the GPU can't run it.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("scatter"))?;
        Ok(Self(module.kernel(c"scatter")?))
    }

    /// `words`: index in `to` or [`super::NOWHERE`] (padding), value, index, value, …
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Indices are inside `to` and differ; all memory is alive until the kernel has run.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        words: Slice<u32>,
        to: Slice<u32>,
    ) -> Result<(), CudaError> {
        let n = words.len() as u32 / 2;
        if n == 0 {
            return Ok(());
        }
        let shape = Shape::new(n.div_ceil(THREADS), THREADS);
        // SAFETY: the types are those of scatter.cu, the caller vouches for the rest.
        unsafe { self.0.launch(stream, shape, &(words, n, to)) }
    }
}
