use std::ffi::c_void;

use cudarc::driver::sys;
use half::bf16;

use super::{Parameter, Slice};
use crate::CudaError;
use crate::error::Check;

/// Tells the tensor memory accelerator (compute capability 9.0) how a matrix lies in memory, and the size
/// of the boxes in which it is copied to shared memory. Kernels take it by value.
#[derive(Clone, Copy)]
pub struct TensorMap(sys::CUtensorMap);

// SAFETY: a description, no handle.
unsafe impl Send for TensorMap {}
// SAFETY: as above.
unsafe impl Sync for TensorMap {}

// SAFETY: the 128 bytes that the driver made, aligned as it wants them.
unsafe impl Parameter for TensorMap {
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(&self.0).cast_mut().cast()
    }
}

impl TensorMap {
    /// A tensor of up to five dimensions, the first of them contiguous, which is copied in boxes with the
    /// 128-byte swizzle: the 16-byte pieces of a row of 128 bytes are permuted so that wgmma reads without
    /// bank conflicts. `pitches` are the bytes from one index to the next of the second dimension and the
    /// following ones. What lies outside the tensor is read as zero.
    ///
    /// # Errors
    /// When the sizes are not possible.
    pub fn swizzled<const DIMENSIONS: usize>(
        data: Slice<bf16>,
        sizes: [u64; DIMENSIONS],
        pitches: &[u64],
        box_sizes: [u32; DIMENSIONS],
    ) -> Result<Self, CudaError> {
        assert_eq!(pitches.len() + 1, DIMENSIONS);
        let steps = [1; DIMENSIONS];
        // SAFETY: all zeros is a value of this C struct.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        // SAFETY: the pointers are to live memory of as many dimensions as are said; the tensor's address
        // is only noted.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                DIMENSIONS as u32,
                data.address() as *mut c_void,
                sizes.as_ptr(),
                pitches.as_ptr(),
                box_sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .check("describing a tensor for block copies")?;
        Ok(Self(map))
    }
}
