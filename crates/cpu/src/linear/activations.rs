use super::isa::Isa;
use super::lanes::{Kernel, Lanes};
use crate::pool::ThreadPool;

/// Columns that share a scale.
pub(super) const BLOCK: usize = 32;

/// Below this many values the threads cost more than they save.
const PARALLEL_BLOCKS: usize = 1024;

/// Blocks that a task quantises.
const TASK_BLOCKS: usize = 256;

/// Smaller values would overflow the reciprocal of the scale; they count as zero.
const TINY: f32 = 1e-30;

/// Adding it to a small number rounds that to an integer, which the low bits of the sum then hold.
/// (`f32::round_ties_even() as i8` does the same, but is not vectorised.)
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23

/// 32 activations of one row as `x[i] ≈ scale · q[i]`, with the sums that weights with an offset or
/// a minimum multiply. One cache line.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct ActBlock {
    /// `q` in -127 ..= 127, four to a word, the first in the low byte.
    pub(super) words: [i32; BLOCK / 4],
    /// NaN if an activation was not finite: the whole row's results become NaN.
    pub(super) scale: f32,
    /// Σ q over columns 0–15, 16–31 and 0–31.
    pub(super) sum: [i32; 3],
    /// `scale · sum`.
    pub(super) scaled_sum: [f32; 3],
}

/// The tokens whose activations the matrix unit takes at once.
pub(super) const TILE_TOKENS: usize = 16;

/// The blocks of sixteen tokens at the same columns, as the matrix unit and the work behind it read
/// them.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct ActTile {
    pub(super) words: [[i32; BLOCK / 4]; TILE_TOKENS],
    pub(super) scale: [f32; TILE_TOKENS],
    pub(super) scaled_sum: [[f32; TILE_TOKENS]; 3],
}

impl ActTile {
    #[inline(always)]
    fn set(&mut self, token: usize, block: &ActBlock) {
        self.words[token] = block.words;
        self.scale[token] = block.scale;
        for (own, sum) in self.scaled_sum.iter_mut().zip(block.scaled_sum) {
            own[token] = sum;
        }
    }
}

/// Quantised activations of `m` tokens.
#[derive(Clone, Copy)]
pub(super) enum Quantized<'a> {
    /// `[m, cols / 32]`
    Blocks(&'a [ActBlock]),
    /// `[m / 16, cols / 32]`: for the matrix unit. What the last tile has beyond the `m` tokens is
    /// left over from earlier ones.
    Tiles(&'a [ActTile]),
}

impl ActBlock {
    /// Sets all but the words.
    #[inline(always)]
    pub(super) fn set_scale(&mut self, scale: f32, first: i32, second: i32) {
        self.scale = scale;
        self.sum = [first, second, first + second];
        self.scaled_sum = [
            scale * first as f32,
            scale * second as f32,
            scale * (first + second) as f32,
        ];
    }
}

/// Quantises `x`, whole blocks, into `out`. Symmetric, to the nearest, ties to even.
pub(super) fn quantize(isa: Isa, pool: &ThreadPool, x: &[f32], out: &mut [ActBlock]) {
    let (x, rest) = x.as_chunks::<BLOCK>();
    assert!(rest.is_empty() && x.len() == out.len());
    if x.len() < PARALLEL_BLOCKS {
        isa.run(Quantize { x, out });
        return;
    }
    pool.run_chunks(out, TASK_BLOCKS, |i, out| {
        isa.run(Quantize {
            x: &x[i * TASK_BLOCKS..][..out.len()],
            out,
        });
    });
}

/// The same for the matrix unit: `x` is `[m, cols]`.
pub(super) fn quantize_tiles(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    cols: usize,
    out: &mut [ActTile],
) {
    pool.run_chunks(out, cols / BLOCK, |i, out| {
        let x = x.chunks(TILE_TOKENS * cols).nth(i).unwrap_or_default();
        isa.run(QuantizeTile { x, cols, out });
    });
}

struct QuantizeTile<'a> {
    x: &'a [f32],
    cols: usize,
    out: &'a mut [ActTile],
}

impl Kernel for QuantizeTile<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let mut block = ActBlock::default();
        for (t, x) in self.x.chunks_exact(self.cols).enumerate() {
            for (x, out) in x.as_chunks().0.iter().zip(&mut *self.out) {
                v.quantize(x, &mut block);
                out.set(t, &block);
            }
        }
    }
}

struct Quantize<'a> {
    x: &'a [[f32; BLOCK]],
    out: &'a mut [ActBlock],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        for (x, out) in self.x.iter().zip(self.out) {
            v.quantize(x, out);
        }
    }
}

/// What [`Lanes::quantize`] does where an instruction set has nothing better.
#[inline(always)]
pub(super) fn quantize_block(x: &[f32; BLOCK], out: &mut ActBlock) {
    // As integers, the magnitudes of floats keep their order, infinity and NaN above all others.
    let mut max = 0;
    for x in x {
        max = max.max(x.abs().to_bits());
    }
    let (scale, inverse) = scales(max);
    let mut q = [0i8; BLOCK];
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * inverse + ROUND).to_bits() as i8;
    }
    for (word, q) in out.words.iter_mut().zip(q.as_chunks::<4>().0) {
        let [a, b, c, d] = *q;
        *word = i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]);
    }
    let (first, second) = q.split_at(BLOCK / 2);
    let sum = |q: &[i8]| q.iter().map(|&q| i32::from(q)).sum();
    out.set_scale(scale, sum(first), sum(second));
}

/// The scale of a block and the factor that quantises it, from the bits of the largest magnitude.
#[inline(always)]
pub(super) fn scales(max: u32) -> (f32, f32) {
    match f32::from_bits(max) {
        max if !max.is_finite() => (f32::NAN, 0.0),
        max if max < TINY => (0.0, 0.0),
        max => (max / 127.0, 127.0 / max),
    }
}
