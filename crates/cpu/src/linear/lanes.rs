//! Sixteen lanes: the vocabulary that the kernels are written in, once for all instruction sets.
//!
//! Every operation is exact or correctly rounded, lane by lane, so a kernel gives the same bits on
//! every instruction set.

use half::{bf16, f16};

use super::activations::{ActBlock, BLOCK, quantize_block};

/// Sixteen float32.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct F32x16(pub(crate) [f32; 16]);

impl F32x16 {
    /// All of them as one slice, which begins with a cache line.
    pub(crate) fn flatten(values: &[Self]) -> &[f32] {
        // SAFETY: the type is sixteen f32 and nothing else.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), 16 * values.len()) }
    }

    /// The same, to write to.
    pub(crate) fn flatten_mut(values: &mut [Self]) -> &mut [f32] {
        // SAFETY: as above; every f32 is valid.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), 16 * values.len()) }
    }
}

/// Sixteen i32.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct I32x16(pub(crate) [i32; 16]);

/// Sixteen float16 or bfloat16, as bits.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Half16(pub(crate) [u16; 16]);

/// Sixteen int8.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub(crate) struct I8x16(pub(crate) [i8; 16]);

/// 64 bytes: four per lane, or eight nibbles per lane.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// An instruction set. A value of the type is the proof that the CPU has it.
pub(crate) trait Lanes: Copy {
    /// Sixteen i32.
    type I: Copy;
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen times four u8.
    type Q: Copy;
    /// The most tokens that a kernel should work on at once: what the registers hold.
    const TOKENS: usize;

    /// Asks for the cache line at an address, which need not be valid, that will be read soon: into the
    /// second-level cache, or from there into the first if it is `near`. Nothing where there is no such
    /// instruction.
    #[inline(always)]
    fn prefetch<T>(self, _at: *const T, _near: bool) {}

    fn splat_i(self, value: i32) -> Self::I;
    fn load_i(self, value: &I32x16) -> Self::I;
    fn bytes(self, line: &Line) -> Self::Q;
    /// The low and the high nibbles of each byte.
    fn nibbles(self, line: &Line) -> (Self::Q, Self::Q);
    /// `low | (high, each byte rotated left by `turn` bits) & mask`. The mask is within bits 4 and 5, and
    /// takes no bit that the rotation carries around.
    fn with_high(self, low: Self::Q, high: Self::Q, turn: u32, mask: u8) -> Self::Q;
    /// Each byte less `offset`, wrapping around.
    fn store_bytes(self, bytes: Self::Q, offset: u8) -> Line;
    /// `acc[l] + Σ_j q[l][j] · x[j]`, where `x` is four i8 (the first in the low byte), none of them
    /// -128. Without `WIDE` every `q` must be below 128.
    fn dot4<const WIDE: bool>(self, acc: Self::I, q: Self::Q, x: i32) -> Self::I;
    fn to_f(self, value: Self::I) -> Self::F;

    /// Quantises a block of activations, as [`quantize_block`] does.
    #[inline(always)]
    fn quantize(self, x: &[f32; BLOCK], out: &mut ActBlock) {
        quantize_block(x, out);
    }

    fn splat(self, value: f32) -> Self::F;
    fn load(self, value: &F32x16) -> Self::F;
    fn load_f16(self, value: &Half16) -> Self::F;
    fn load_bf16(self, value: &Half16) -> Self::F;
    fn load_i8(self, value: &I8x16) -> Self::F;
    fn store(self, value: Self::F) -> F32x16;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The sum, halves added to halves: a fixed order that takes few steps.
    fn fold_add(self, value: Self::F) -> f32;
    /// The maximum, if none is NaN.
    fn fold_max(self, value: Self::F) -> f32;
}

/// Work that is written against [`Lanes`]; mark `run` as `#[inline(always)]`.
pub(crate) trait Kernel {
    fn run<V: Lanes>(self, lanes: V);
}

/// Plain Rust: for CPUs without the instruction sets below, and the reference for their tests. A CPU
/// without fused multiply-add computes it in software, slowly.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

impl Lanes for Scalar {
    type I = [i32; 16];
    type F = [f32; 16];
    type Q = [u8; 64];
    const TOKENS: usize = 4;

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [value; 16]
    }

    #[inline(always)]
    fn load_i(self, value: &I32x16) -> Self::I {
        value.0
    }

    #[inline(always)]
    fn store_bytes(self, bytes: Self::Q, offset: u8) -> Line {
        Line(bytes.map(|b| b.wrapping_sub(offset)))
    }

    #[inline(always)]
    fn bytes(self, line: &Line) -> Self::Q {
        line.0
    }

    #[inline(always)]
    fn nibbles(self, line: &Line) -> (Self::Q, Self::Q) {
        (line.0.map(|b| b & 0x0f), line.0.map(|b| b >> 4))
    }

    #[inline(always)]
    fn with_high(self, low: Self::Q, high: Self::Q, turn: u32, mask: u8) -> Self::Q {
        std::array::from_fn(|i| low[i] | (high[i].rotate_left(turn) & mask))
    }

    #[inline(always)]
    fn dot4<const WIDE: bool>(self, mut acc: Self::I, q: Self::Q, x: i32) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x.cast_signed()));
        for (acc, q) in acc.iter_mut().zip(q.as_chunks::<4>().0) {
            for (q, x) in q.iter().zip(x) {
                *acc += i32::from(*q) * x;
            }
        }
        acc
    }

    #[inline(always)]
    fn to_f(self, value: Self::I) -> Self::F {
        value.map(|v| v as f32)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; 16]
    }

    #[inline(always)]
    fn load(self, value: &F32x16) -> Self::F {
        value.0
    }

    #[inline(always)]
    fn load_f16(self, value: &Half16) -> Self::F {
        value.0.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn load_bf16(self, value: &Half16) -> Self::F {
        value.0.map(|bits| bf16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn load_i8(self, value: &I8x16) -> Self::F {
        value.0.map(f32::from)
    }

    #[inline(always)]
    fn store(self, value: Self::F) -> F32x16 {
        F32x16(value)
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|l| a[l] + b[l])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|l| a[l] * b[l])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|l| a[l].mul_add(b[l], c[l]))
    }

    #[inline(always)]
    fn fold_add(self, value: Self::F) -> f32 {
        fold(value, |a, b| a + b)
    }

    #[inline(always)]
    fn fold_max(self, value: Self::F) -> f32 {
        fold(value, |a, b| if a > b { a } else { b }) // as the instruction does
    }
}

#[inline(always)]
fn fold(mut values: [f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            values[i] = f(values[i], values[i + half]);
        }
    }
    values[0]
}
