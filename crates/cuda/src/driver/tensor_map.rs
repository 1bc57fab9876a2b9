use std::ffi::c_void;

use cudarc::driver::sys;
use half::bf16;

use super::{Plain, Slice};
use crate::CudaError;
use crate::error::Check;

/// How the tensor memory accelerator of compute capability 9.0 sees a row-major bfloat16 matrix: a
/// copy moves one box of it to or from shared memory.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap([u8; 128]);

// SAFETY: 128 bytes that the driver fills and the GPU reads.
unsafe impl Plain for TensorMap {}

impl TensorMap {
    /// The map that no kernel reads.
    pub const UNUSED: Self = Self([0; 128]);

    /// A matrix `[rows, cols]` in boxes `[box_rows, box_cols]`. Rows of a box have 64 or 128 bytes and
    /// are swizzled over as many. What a box has outside the matrix is read as zero and not written.
    ///
    /// # Errors
    /// When the driver finds the sizes impossible: `cols` is to be a multiple of 8, `box_rows` at
    /// most 256.
    ///
    /// # Panics
    /// If the memory is smaller than the matrix or the box has another width.
    pub fn new(
        matrix: Slice<bf16>,
        [rows, cols]: [usize; 2],
        [box_rows, box_cols]: [u32; 2],
    ) -> Result<Self, CudaError> {
        assert!(matrix.len() >= rows * cols);
        let swizzle = match box_cols {
            32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => panic!("a box is 32 or 64 elements wide, not {box_cols}"),
        };
        let mut map = Self::UNUSED;
        let sizes = [cols as u64, rows as u64];
        let (stride, box_sizes, element_strides) = (2 * cols as u64, [box_cols, box_rows], [1, 1]);
        // SAFETY: the map has the size and alignment of a CUtensorMap; the arrays are as long as the
        // rank of 2 says (strides: one less).
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.address() as *mut c_void,
                sizes.as_ptr(),
                &raw const stride,
                box_sizes.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .check("describing a matrix to the GPU")?;
        Ok(map)
    }
}
