use half::bf16;

use super::{VEC, image};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Shape, Slice, Stream};

/// In place of a token id, with a slot in the other bits: the token sampled last for that slot.
pub const LAST: u32 = 1 << 31;

/// `out[t] = scale * table[token(t)]`.
pub struct Embed(Kernel);

impl Embed {
    /// Loads the kernel.
    ///
    /// # Errors
    /// When the GPU can't run it.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("embed"))?;
        Ok(Self(module.kernel(c"embed")?))
    }

    /// `tokens`: ids below the rows of `table`, or [`LAST`]` | slot`; `last`: one per slot; `table`:
    /// `[vocab, width]`; `out`: `[tokens, width]`.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Ids and slots are in range; all memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If `width` is not a multiple of 8 or `out` is too small.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        tokens: Slice<u32>,
        last: Slice<i32>,
        table: Slice<bf16>,
        scale: f32,
        width: usize,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        assert!(width.is_multiple_of(VEC) && out.len() >= tokens.len() * width);
        let threads = (width / VEC).next_multiple_of(32).min(256) as u32;
        let shape = Shape::new(tokens.len() as u32, threads);
        let arguments = (tokens, last, table, scale, width as u32, out);
        // SAFETY: the types are those of embed.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe { self.0.launch(stream, shape, &arguments) }
    }
}
