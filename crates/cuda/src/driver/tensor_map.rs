use std::ffi::c_void;

use cudarc::driver::sys;
use half::bf16;

use super::{Plain, Slice};
use crate::CudaError;
use crate::error::Check;

/// How the tensor memory accelerator of compute capability 9.0 sees bfloat16 numbers in memory: a copy
/// moves one box of them to or from shared memory.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap([u8; 128]);

// SAFETY: 128 bytes that the driver fills and the GPU reads.
unsafe impl Plain for TensorMap {}

impl TensorMap {
    /// The map that no kernel reads.
    pub const UNUSED: Self = Self([0; 128]);

    /// A matrix `[rows, cols]`, with `stride` elements from a row to the next, in boxes
    /// `[box_rows, box_cols]`. Rows of a box have 32, 64 or 128 bytes and are swizzled over as many. What a box
    /// has outside the matrix is read as zero and not written.
    ///
    /// # Errors
    /// When the driver finds the sizes impossible: the start and `stride` are to be multiples of 8
    /// elements, `box_rows` at most 256.
    ///
    /// # Panics
    /// If the memory is smaller than the matrix or the box has another width.
    pub fn new(
        matrix: Slice<bf16>,
        [rows, cols]: [usize; 2],
        stride: usize,
        [box_rows, box_cols]: [u32; 2],
    ) -> Result<Self, CudaError> {
        assert!(stride >= cols && matrix.len() >= (rows - 1) * stride + cols);
        let swizzle = match box_cols {
            16 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => panic!("a box is 16, 32 or 64 elements wide, not {box_cols}"),
        };
        let (sizes, pitch) = ([cols as u64, rows as u64], [2 * stride as u64]);
        Self::encode(matrix, sizes, &pitch, [box_cols, box_rows], swizzle)
    }

    /// A matrix `[rows, cols]` whose rows are gates and then as many ups, each a multiple of 8: boxes are 64
    /// wide and have 8 rows of gates and 8 of ups in turn, `box_rows` together. A row of a box is swizzled over its
    /// 128 bytes. What a box has outside the matrix is read as zero.
    ///
    /// # Errors
    /// When the driver finds the sizes impossible: `cols` is to be a multiple of 8, `box_rows` one of 16 and
    /// at most 256.
    pub fn gates(
        matrix: Slice<bf16>,
        [rows, cols]: [usize; 2],
        box_rows: u32,
    ) -> Result<Self, CudaError> {
        assert!(rows.is_multiple_of(16) && matrix.len() >= rows * cols);
        let pitch = 2 * cols as u64;
        Self::encode(
            matrix,
            [cols as u64, 8, 2, rows as u64 / 16],
            &[pitch, rows as u64 / 2 * pitch, 8 * pitch],
            [64, 8, 2, box_rows / 16],
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        )
    }

    /// The rows of attention heads, `[rows, columns]`, in boxes of whole rows, which go to shared memory as
    /// parts of 64 elements: of 8 rows first the first part, then the second and so on, then the next 8
    /// rows. Each part of a row has 128 bytes and is swizzled over as many.
    ///
    /// What a box has behind the last row is read as zero. Where `columns` is no multiple of 64, the last
    /// part ends with elements of the next row, or with what lies up to 64 bytes behind the last one.
    ///
    /// # Errors
    /// When the driver finds the sizes impossible: `columns` is to be a multiple of 8, `box_rows` one of
    /// 8 and at most 256.
    pub fn heads(data: Slice<bf16>, columns: u32, box_rows: u32) -> Result<Self, CudaError> {
        let (parts, pitch) = (columns.div_ceil(64), 2 * u64::from(columns));
        let groups = data.len() / (8 * columns as usize);
        Self::encode(
            data,
            [64, 8, u64::from(parts), groups as u64],
            &[pitch, 128, 8 * pitch],
            [64, 8, parts, box_rows / 8],
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        )
    }

    /// Sizes from the innermost dimension outwards; `pitches` are in bytes, of all but the innermost.
    fn encode<const RANK: usize>(
        data: Slice<bf16>,
        sizes: [u64; RANK],
        pitches: &[u64],
        box_sizes: [u32; RANK],
        swizzle: sys::CUtensorMapSwizzle,
    ) -> Result<Self, CudaError> {
        assert_eq!(pitches.len() + 1, RANK);
        let (mut map, element_strides) = (Self::UNUSED, [1; RANK]);
        // SAFETY: the map has the size and alignment of a CUtensorMap; the arrays are as long as the rank
        // says (pitches: one less).
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                RANK as u32,
                data.address() as *mut c_void,
                sizes.as_ptr(),
                pitches.as_ptr(),
                box_sizes.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .check("describing memory for block copies")?;
        Ok(map)
    }
}
