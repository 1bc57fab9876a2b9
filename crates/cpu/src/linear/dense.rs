//! Float weights in panels of sixteen rows.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use spate_model::quant::{GgmlType, QuantError, dequantize};

use super::isa::Isa;
use super::lanes::{F32x16, Half16, Lanes};
use super::memory::huge_vec;
use super::sweep::{PANEL, Panels, Sweep, panels};
use crate::pool::ThreadPool;

/// Columns whose products are summed before they are added to the total: shorter chains of
/// additions lose less.
const SPAN: usize = 64;

/// One column of a panel: sixteen weights, one per row.
pub(crate) trait Column: Copy + Send + Sync {
    const ZERO: Self;
    fn set(&mut self, lane: usize, weight: f32);
    /// Sixteen at once.
    fn from_floats(weights: &[f32; PANEL]) -> Self;
    /// Copies one lane of another column.
    fn set_from(&mut self, lane: usize, other: &Self, from: usize);
    fn get(&self, lane: usize) -> f32;
    fn load<V: Lanes>(&self, v: V) -> V::F;
}

impl Column for F32x16 {
    const ZERO: Self = F32x16([0.0; PANEL]);

    fn set(&mut self, lane: usize, weight: f32) {
        self.0[lane] = weight;
    }

    fn from_floats(weights: &[f32; PANEL]) -> Self {
        F32x16(*weights)
    }

    fn set_from(&mut self, lane: usize, other: &Self, from: usize) {
        self.0[lane] = other.0[from];
    }

    fn get(&self, lane: usize) -> f32 {
        self.0[lane]
    }

    #[inline(always)]
    fn load<V: Lanes>(&self, v: V) -> V::F {
        v.load(self)
    }
}

/// Sixteen float16.
#[derive(Clone, Copy)]
pub(crate) struct F16x16(Half16);

impl Column for F16x16 {
    const ZERO: Self = F16x16(Half16([0; PANEL]));

    fn set(&mut self, lane: usize, weight: f32) {
        self.0.0[lane] = f16::from_f32(weight).to_bits();
    }

    fn from_floats(weights: &[f32; PANEL]) -> Self {
        let mut halves = [f16::ZERO; PANEL];
        halves.convert_from_f32_slice(weights);
        Self(Half16(halves.map(f16::to_bits)))
    }

    fn set_from(&mut self, lane: usize, other: &Self, from: usize) {
        self.0.0[lane] = other.0.0[from];
    }

    fn get(&self, lane: usize) -> f32 {
        f16::from_bits(self.0.0[lane]).to_f32()
    }

    #[inline(always)]
    fn load<V: Lanes>(&self, v: V) -> V::F {
        v.load_f16(&self.0)
    }
}

/// Sixteen bfloat16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16x16(Half16);

impl Column for Bf16x16 {
    const ZERO: Self = Bf16x16(Half16([0; PANEL]));

    fn set(&mut self, lane: usize, weight: f32) {
        self.0.0[lane] = bf16::from_f32(weight).to_bits();
    }

    fn from_floats(weights: &[f32; PANEL]) -> Self {
        let mut halves = [bf16::ZERO; PANEL];
        halves.convert_from_f32_slice(weights);
        Self(Half16(halves.map(bf16::to_bits)))
    }

    fn set_from(&mut self, lane: usize, other: &Self, from: usize) {
        self.0.0[lane] = other.0.0[from];
    }

    fn get(&self, lane: usize) -> f32 {
        bf16::from_bits(self.0.0[lane]).to_f32()
    }

    #[inline(always)]
    fn load<V: Lanes>(&self, v: V) -> V::F {
        v.load_bf16(&self.0)
    }
}

/// A matrix of floats: `[panels, cols]` columns of sixteen rows; missing rows of the last panel are zero.
pub(super) struct Dense<C> {
    cols: usize,
    columns: Vec<C>,
}

impl<C: Column> Dense<C> {
    /// `bytes` are `rows · cols` weights of type `ty`.
    pub(super) fn new(
        ty: GgmlType,
        (rows, cols): (usize, usize),
        bytes: &[u8],
        pool: &ThreadPool,
    ) -> Result<Self, QuantError> {
        let row_bytes = ty.row_bytes(cols)?;
        let mut columns = huge_vec(C::ZERO, panels(rows) * cols);
        pool.run_chunks(&mut columns, cols, |panel, columns| {
            let mut weights = vec![0.0; cols];
            let rows = bytes
                .chunks_exact(row_bytes)
                .skip(panel * PANEL)
                .take(PANEL);
            for (lane, row) in rows.enumerate() {
                dequantize(ty, row, &mut weights).expect("a row has row_bytes");
                for (column, &weight) in columns.iter_mut().zip(&weights) {
                    column.set(lane, weight);
                }
            }
        });
        Ok(Self { cols, columns })
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.columns)
    }

    /// The products of `sweep`'s panels with `x`, `[m, cols]`.
    pub(super) fn times(&self, isa: Isa, x: &[f32], sweep: Sweep<'_>) {
        sweep.run(isa, DenseTimes { weights: self, x });
    }

    /// One row as float32.
    pub(super) fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let panel = &self.columns[row / PANEL * self.cols..][..self.cols];
        for (out, column) in out.iter_mut().zip(panel) {
            *out = column.get(row % PANEL);
        }
    }
}

/// Each result is the sum over spans of 64 columns, from the first on, of the span's own sum; both
/// add from left to right, products are not rounded.
struct DenseTimes<'a, C> {
    weights: &'a Dense<C>,
    /// `[m, cols]`
    x: &'a [f32],
}

impl<C: Column> Panels for DenseTimes<'_, C> {
    #[inline(always)]
    fn tile<V: Lanes, const T: usize>(&self, v: V, panel: usize, token: usize) -> [V::F; T] {
        let cols = self.weights.cols;
        let columns = &self.weights.columns[panel * cols..][..cols];
        let mut x: [&[f32]; T] = [&[]; T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = &self.x[(token + t) * cols..][..cols];
        }
        let mut total = [v.splat(0.0); T];
        for (s, columns) in columns.chunks(SPAN).enumerate() {
            let mut sum = [v.splat(0.0); T];
            for (c, column) in columns.iter().enumerate() {
                let column = column.load(v);
                for t in 0..T {
                    sum[t] = v.mul_add(column, v.splat(x[t][s * SPAN + c]), sum[t]);
                }
            }
            for t in 0..T {
                total[t] = v.add(total[t], sum[t]);
            }
        }
        total
    }
}
