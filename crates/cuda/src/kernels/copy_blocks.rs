use super::{KvShape, image};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Shape, Slice, Stream};

const THREADS: u32 = 256;

/// Copies whole KV blocks, in every layer.
pub struct CopyBlocks(Kernel);

impl CopyBlocks {
    /// Loads the kernel.
    ///
    /// # Errors
    /// When the GPU can't run it.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("copy_blocks"))?;
        Ok(Self(module.kernel(c"copy_blocks")?))
    }

    /// `pairs`: from, to, from, to, …; `cache`: as [`KvShape`] says, with all layers.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Blocks are inside the cache, and none is both read and written; all memory is alive until the
    /// kernel has run.
    ///
    /// # Panics
    /// If `cache` is not made of whole layers or there are more than 65,535 pairs or layers.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        shape: &KvShape,
        pairs: Slice<u32>,
        cache: Slice<u8>,
    ) -> Result<(), CudaError> {
        let (copies, layers) = (pairs.len() / 2, cache.len() / shape.layer_bytes());
        assert!(cache.len().is_multiple_of(shape.layer_bytes()));
        assert!(copies < 1 << 16 && layers < 1 << 16);
        if copies == 0 || layers == 0 {
            return Ok(());
        }
        let bytes = shape.block_bytes();
        let slices = (bytes / 16).div_ceil(4 * THREADS as usize) as u32;
        let grid = Shape::new(slices, THREADS).grid_yz(copies as u32, layers as u32);
        let arguments = (pairs, cache, shape.blocks, bytes as u32);
        // SAFETY: the types are those of copy_blocks.cu (a pair is two words), the caller vouches for
        // the rest.
        unsafe { self.0.launch(stream, grid, &arguments) }
    }
}
