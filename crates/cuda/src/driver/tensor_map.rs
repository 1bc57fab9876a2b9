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
    /// A row-major matrix of rows of `columns` elements, copied in boxes of `box_columns` x `box_rows` in
    /// which the 16-byte pieces of a row are permuted so that wgmma reads without bank conflicts (the
    /// 128-byte swizzle). What lies outside the matrix is read as zero.
    ///
    /// # Errors
    /// When the sizes are not possible.
    pub fn swizzled(
        matrix: Slice<bf16>,
        columns: u32,
        box_columns: u32,
        box_rows: u32,
    ) -> Result<Self, CudaError> {
        let rows = (matrix.len() / columns as usize) as u64;
        let (sizes, pitch) = ([u64::from(columns), rows], [u64::from(columns) * 2]);
        let (boxes, steps) = ([box_columns, box_rows], [1, 1]);
        // SAFETY: all zeros is a value of this C struct.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        // SAFETY: the pointers are to live locals of as many dimensions as are said; the matrix' address
        // is only noted.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.address() as *mut c_void,
                sizes.as_ptr(),
                pitch.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .check("describing a matrix for block copies")?;
        Ok(Self(map))
    }
}
