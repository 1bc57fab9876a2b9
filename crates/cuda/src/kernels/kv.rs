use std::ffi::c_void;

use super::image;
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Parameter, Shape, Slice, Stream};

/// Elements that can share a scale.
const GROUP: u32 = 16;

/// How the numbers of the KV cache are stored. Attention computes with bfloat16 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum KvDtype {
    /// The upper half of a float32.
    Bf16 = 0,
    /// 8-bit integers; a bfloat16 scale for every 16 numbers of a key or a value. Keys are rotated first,
    /// so that the few large elements that some models' keys have don't cost the others their bits.
    Int8 = 1,
    /// 8-bit floats with 4 bits of exponent and 3 of mantissa (e4m3); a bfloat16 scale for every key and
    /// every value.
    Fp8 = 2,
}

impl KvDtype {
    /// Bytes of one position's key (or value) in one head.
    fn row_bytes(self, head_dim: u32) -> u32 {
        match self {
            Self::Bf16 => 2 * head_dim,
            Self::Int8 => head_dim + 2 * (head_dim / GROUP),
            Self::Fp8 => head_dim + 2,
        }
    }
}

/// Sizes of a pool of KV blocks, `[layers][blocks][2][kv_heads]` tiles of `block_size` rows; see
/// `kernels/include/kv.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct KvShape {
    /// Blocks in the pool.
    pub blocks: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Positions in a block, a multiple of 16.
    pub block_size: u32,
    /// Width of a head, a multiple of 16.
    pub head_dim: u32,
    row_bytes: u32,
    dtype: KvDtype,
}

// SAFETY: laid out as in kv.cuh.
unsafe impl Parameter for KvShape {
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

impl KvShape {
    /// A pool for heads of one kind.
    pub fn new(dtype: KvDtype, blocks: u32, kv_heads: u32, block_size: u32, head_dim: u32) -> Self {
        Self {
            blocks,
            kv_heads,
            block_size,
            head_dim,
            row_bytes: dtype.row_bytes(head_dim),
            dtype,
        }
    }

    /// How numbers are stored.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// The same heads in another pool.
    #[must_use]
    pub fn with(&self, dtype: KvDtype, blocks: u32) -> Self {
        Self::new(dtype, blocks, self.kv_heads, self.block_size, self.head_dim)
    }

    /// Whether numbers are codes of 8 bits.
    pub fn is_packed(&self) -> bool {
        self.dtype != KvDtype::Bf16
    }

    /// Bytes of one position's key (or value) in one head, its scales included.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes as usize
    }

    /// Scales of one key or value.
    pub fn scales(&self) -> usize {
        match self.dtype {
            KvDtype::Bf16 => 0,
            _ => (self.row_bytes - self.head_dim) as usize / 2,
        }
    }

    /// Bytes of a head's keys (or values) in one block.
    pub fn tile_bytes(&self) -> usize {
        self.block_size as usize * self.row_bytes()
    }

    /// Bytes of one block in one layer, keys and values.
    pub fn block_bytes(&self) -> usize {
        2 * self.kv_heads as usize * self.tile_bytes()
    }

    /// Bytes of one layer.
    pub fn layer_bytes(&self) -> usize {
        self.blocks as usize * self.block_bytes()
    }
}

/// Makes bfloat16 of whole blocks of codes.
pub struct UnpackBlocks(Kernel);

impl UnpackBlocks {
    /// Loads the kernel.
    ///
    /// # Errors
    /// When the GPU can't run it.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("unpack_blocks"))?;
        Ok(Self(module.kernel(c"unpack_blocks")?))
    }

    /// `cache`: as `shape` says, with all layers; `blocks`: which blocks; `out`: they, one after another, as
    /// a pool of bfloat16 with one layer.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Blocks are inside the cache; all memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If a buffer is too small or the cache has no codes.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        shape: &KvShape,
        cache: Slice<u8>,
        layer: usize,
        blocks: Slice<u32>,
        out: Slice<u8>,
    ) -> Result<(), CudaError> {
        const THREADS: u32 = 256;
        let count = blocks.len();
        let unpacked = shape.with(KvDtype::Bf16, count as u32);
        assert!(shape.is_packed());
        assert!(cache.len() >= (layer + 1) * shape.layer_bytes());
        assert!(out.len() >= unpacked.layer_bytes());
        if count == 0 {
            return Ok(());
        }
        let pieces = unpacked.block_bytes() as u32 / 32;
        let slices = pieces.div_ceil(4 * THREADS);
        let grid = Shape::new(count as u32, THREADS).grid_yz(slices, 1);
        let arguments = (cache, *shape, layer as u32, blocks, out);
        // SAFETY: the types are those of unpack_blocks.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe { self.0.launch(stream, grid, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernels copy 16 bytes at a time, and so do tensor maps.
    #[test]
    fn everything_in_a_block_is_aligned() {
        for dtype in [KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8] {
            for head_dim in [64, 80, 96, 128, 256] {
                for block_size in [16, 48, 256] {
                    let shape = KvShape::new(dtype, 1, 1, block_size, head_dim);
                    assert!(shape.tile_bytes().is_multiple_of(16));
                    let codes = (16 * head_dim) as usize;
                    assert!((16 * shape.row_bytes() - codes).is_multiple_of(16));
                }
            }
        }
    }

    #[test]
    fn bytes_of_a_row_count_its_scales() {
        let bytes = |dtype| KvShape::new(dtype, 1, 1, 16, 128).row_bytes();
        let dtypes = [KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8];
        assert_eq!(dtypes.map(bytes), [256, 144, 130]);
    }
}
