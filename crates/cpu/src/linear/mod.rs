//! Matrix products: weights `[rows, cols]` (rows are output features) times activations `[m, cols]`.
//!
//! Weights are rearranged at load into panels of sixteen output rows, so that one register holds
//! one partial sum of each. They stay as they are in the file, 4, 5, 6 or 8 bits wide, and meet
//! activations that are quantised to 8 bits in blocks of 32 ([`LinearWeight::fast`]), or they are
//! expanded to float32 ([`LinearWeight::exact`]).
//!
//! An output depends on its weights and its token's activations only: the order of its additions is
//! fixed and written down at the kernels, so neither `m`, nor the other rows, nor the number of
//! threads or the instruction set change a bit of it.

// Loops over vectors are written out: closures are compiled without the instruction set and so not
// inlined.
#![allow(clippy::needless_range_loop)]

mod activations;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod dense;
mod isa;
mod lanes;
mod memory;
mod packed;
mod sweep;
#[cfg(test)]
mod tests;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tile_sweep;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use isa::Isa;

use spate_model::quant::{GgmlType, QuantError};

use crate::pool::{Disjoint, ThreadPool};
use activations::{ActBlock, ActTile, BLOCK, Quantized, TILE_TOKENS, quantize, quantize_tiles};
use dense::Dense;
pub(crate) use dense::{Bf16x16, Column, F16x16};
pub(crate) use lanes::{F32x16, I8x16, Kernel, Lanes};
pub(crate) use memory::advise_huge_pages;
use memory::huge_vec;
use packed::Packed;
use sweep::{Sweep, panels};

/// Tasks per thread: enough that a thread that starts late costs little.
const TASKS: usize = 8;

/// From so many tokens on the matrix unit is faster: with 8 it takes as long for groups of 32, and half as
/// long again for groups of 16.
const TILED_TOKENS: usize = 16;

/// A matrix, ready to be multiplied with.
pub struct LinearWeight {
    rows: usize,
    cols: usize,
    data: Data,
}

enum Data {
    F32(Dense<F32x16>),
    F16(Dense<F16x16>),
    Bf16(Dense<Bf16x16>),
    Packed(Packed),
}

/// What [`linear`] needs besides its operands; reused from call to call.
pub struct Scratch {
    isa: Isa,
    blocks: Vec<ActBlock>,
    /// With a matrix unit, for more than a few tokens.
    tiles: Vec<ActTile>,
}

impl Scratch {
    /// Room for `m · cols` activations; more are allocated if a call brings more.
    pub fn new(m: usize, cols: usize) -> Self {
        Self::with_isa(Isa::best(), m, cols)
    }

    /// The same, for one of [`Isa::available`].
    pub fn with_isa(isa: Isa, m: usize, cols: usize) -> Self {
        let (blocks, tiles) = Self::counts(isa, m, cols);
        Self {
            isa,
            blocks: huge_vec(ActBlock::default(), blocks),
            tiles: huge_vec(ActTile::default(), tiles),
        }
    }

    /// Blocks and tiles for every number of tokens up to `m`.
    fn counts(isa: Isa, m: usize, cols: usize) -> (usize, usize) {
        let blocks = cols.div_ceil(BLOCK);
        match isa.has_tiles() && m >= TILED_TOKENS {
            true => (
                (TILED_TOKENS - 1) * blocks,
                m.div_ceil(TILE_TOKENS) * blocks,
            ),
            false => (m * blocks, 0),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.blocks) + size_of_val(&*self.tiles)
    }

    /// What [`bytes`](Self::bytes) will say of a [`new`](Self::new) one.
    pub fn bytes_for(m: usize, cols: usize) -> u64 {
        let (blocks, tiles) = Self::counts(Isa::best(), m, cols);
        (blocks * size_of::<ActBlock>() + tiles * size_of::<ActTile>()) as u64
    }

    /// `x`, `[m, cols]`, in 8 bits.
    fn quantize(&mut self, pool: &ThreadPool, x: &[f32], m: usize) -> Quantized<'_> {
        let cols = x.len() / m;
        let (_, tiles) = Self::counts(self.isa, m, cols);
        if tiles > 0 {
            if self.tiles.len() < tiles {
                self.tiles.resize(tiles, ActTile::default());
            }
            quantize_tiles(self.isa, pool, x, cols, &mut self.tiles[..tiles]);
            return Quantized::Tiles(&self.tiles[..tiles]);
        }
        let blocks = x.len() / BLOCK;
        if self.blocks.len() < blocks {
            self.blocks.resize(blocks, ActBlock::default());
        }
        quantize(self.isa, pool, x, &mut self.blocks[..blocks]);
        Quantized::Blocks(&self.blocks[..blocks])
    }
}

impl LinearWeight {
    /// Expands `bytes`, `[rows, cols]` weights of type `ty` as in a GGUF file, to float32.
    ///
    /// # Errors
    /// If there are no weights, `cols` is not a whole number of blocks or `bytes` has another size than the shape.
    pub fn exact(
        ty: GgmlType,
        (rows, cols): (usize, usize),
        bytes: &[u8],
        pool: &ThreadPool,
    ) -> Result<Self, QuantError> {
        check_size(ty, (rows, cols), bytes)?;
        let data = Data::F32(Dense::new(ty, (rows, cols), bytes, pool)?);
        Ok(Self { rows, cols, data })
    }

    /// Keeps the weights as wide as they are in the file, or nearly: formats of 2 and 3 bits take 4, those
    /// of 4 with a table 8, and each group of 16 or 32 has a float16 scale.
    ///
    /// # Errors
    /// As [`exact`](Self::exact).
    pub fn fast(
        ty: GgmlType,
        (rows, cols): (usize, usize),
        bytes: &[u8],
        pool: &ThreadPool,
    ) -> Result<Self, QuantError> {
        check_size(ty, (rows, cols), bytes)?;
        let data = match (ty, ty.scheme()) {
            (_, Some(scheme)) => Data::Packed(Packed::new(ty, scheme, (rows, cols), bytes, pool)),
            (GgmlType::F16, _) => Data::F16(Dense::new(ty, (rows, cols), bytes, pool)?),
            (GgmlType::BF16, _) => Data::Bf16(Dense::new(ty, (rows, cols), bytes, pool)?),
            _ => Data::F32(Dense::new(ty, (rows, cols), bytes, pool)?),
        };
        Ok(Self { rows, cols, data })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(dense) => dense.bytes(),
            Data::F16(dense) => dense.bytes(),
            Data::Bf16(dense) => dense.bytes(),
            Data::Packed(packed) => packed.bytes(),
        }
    }

    /// What [`bytes`](Self::bytes) will say of an [`exact`](Self::exact) matrix of `(rows, cols)`.
    pub fn exact_bytes((rows, cols): (usize, usize)) -> u64 {
        (panels(rows) * cols * size_of::<F32x16>()) as u64
    }

    /// What [`bytes`](Self::bytes) will say of a [`fast`](Self::fast) matrix of `(rows, cols)`.
    pub fn fast_bytes(ty: GgmlType, (rows, cols): (usize, usize)) -> u64 {
        let column = match (ty, ty.scheme()) {
            (_, Some(scheme)) => return Packed::bytes_for(scheme, (rows, cols)) as u64,
            (GgmlType::F16, _) => size_of::<F16x16>(),
            (GgmlType::BF16, _) => size_of::<Bf16x16>(),
            _ => size_of::<F32x16>(),
        };
        (panels(rows) * cols * column) as u64
    }

    /// One row as float32: what an embedding looks up.
    ///
    /// # Panics
    /// If there is no such row or `out` does not have `cols` elements.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "row {row} of {}",
            self.rows
        );
        match &self.data {
            Data::F32(dense) => dense.row_to_f32(row, out),
            Data::F16(dense) => dense.row_to_f32(row, out),
            Data::Bf16(dense) => dense.row_to_f32(row, out),
            Data::Packed(packed) => packed.row_to_f32(row, out),
        }
    }

    fn times(&self, isa: Isa, x: &[f32], quantized: Quantized<'_>, sweep: Sweep<'_>) {
        match &self.data {
            Data::F32(dense) => dense.times(isa, x, sweep),
            Data::F16(dense) => dense.times(isa, x, sweep),
            Data::Bf16(dense) => dense.times(isa, x, sweep),
            Data::Packed(packed) => packed.times(isa, quantized, sweep),
        }
    }
}

/// `out[i][t, r] = Σ_c weights[i][r, c] · x[t, c]` for several matrices with the same input (query,
/// key and value; gate and up): the activations are quantised once and the threads start once.
///
/// `x` is `[m, cols]`, `outs[i]` is `[m, weights[i].rows()]`.
///
/// # Panics
/// If a shape does not fit.
pub fn linear(
    pool: &ThreadPool,
    weights: &[&LinearWeight],
    x: &[f32],
    m: usize,
    outs: &mut [&mut [f32]],
    scratch: &mut Scratch,
) {
    let Some(first) = weights.first() else { return };
    let cols = first.cols;
    assert_eq!(x.len(), m * cols, "activations of [{m}, {cols}]");
    assert_eq!(weights.len(), outs.len(), "one output per matrix");
    for (weight, out) in weights.iter().zip(&*outs) {
        assert_eq!(weight.cols, cols, "matrices with the same input");
        assert_eq!(
            out.len(),
            m * weight.rows,
            "output of [{m}, {}]",
            weight.rows
        );
    }

    let isa = scratch.isa;
    let packed = |weight: &&LinearWeight| matches!(weight.data, Data::Packed(_));
    let quantized = match weights.iter().any(packed) && m > 0 {
        true => scratch.quantize(pool, x, m),
        false => Quantized::Blocks(&[]),
    };

    let outs: Vec<Disjoint<'_, f32>> = outs.iter_mut().map(|out| Disjoint::new(out)).collect();
    let total: usize = weights.iter().map(|weight| panels(weight.rows)).sum();
    let tasks = total.min(pool.threads() * TASKS);
    pool.run(tasks, |task| {
        // This task's panels, counted through all matrices.
        let (mut start, mut end) = (task * total / tasks, (task + 1) * total / tasks);
        for (weight, out) in weights.iter().zip(&outs) {
            let count = panels(weight.rows);
            let panels = start.min(count)..end.min(count);
            if !panels.is_empty() {
                weight.times(
                    isa,
                    x,
                    quantized,
                    Sweep {
                        panels,
                        m,
                        rows: weight.rows,
                        out,
                    },
                );
            }
            (start, end) = (start.saturating_sub(count), end.saturating_sub(count));
        }
    });
}

fn check_size(ty: GgmlType, (rows, cols): (usize, usize), bytes: &[u8]) -> Result<(), QuantError> {
    let too_large = QuantError::TooLarge { ty, cols };
    let weights = rows.checked_mul(cols).ok_or(too_large.clone())?;
    if weights == 0 {
        return Err(QuantError::Empty { ty });
    }
    let expected = ty.row_bytes(cols)?.checked_mul(rows).ok_or(too_large)?;
    if expected != bytes.len() {
        return Err(QuantError::Length {
            ty,
            weights,
            expected,
            got: bytes.len(),
        });
    }
    Ok(())
}
