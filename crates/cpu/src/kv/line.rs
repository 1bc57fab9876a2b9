use half::f16;

use crate::linear::{Bf16x16, Column, F16x16, F32x16, I8x16, Lanes};

/// How the numbers of the KV cache are stored. Attention computes in float32 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision: 11 significant bits, magnitudes up to 65504.
    F16,
    /// The upper half of a float32: 8 significant bits, its whole range.
    Bf16,
    /// 8-bit integers; a float16 scale for every 16 numbers of a key or a value. Keys are rotated
    /// first, so that the few large elements that some models' keys have don't cost the others
    /// their bits. What a bias adds to all keys alike is left out, as it is of the other narrow
    /// types.
    Int8,
}

impl KvDtype {
    /// Bytes of one position's key (or value) in one head.
    pub(crate) fn vector_bytes(self, head_dim: usize) -> usize {
        match self {
            KvDtype::F32 => head_dim * size_of::<f32>(),
            KvDtype::F16 | KvDtype::Bf16 => head_dim * size_of::<u16>(),
            KvDtype::Int8 => head_dim + head_dim / GROUP * size_of::<u16>(),
        }
    }
}

/// Elements of a key or a value that share a scale.
pub(crate) const GROUP: usize = 16;

/// Sixteen numbers in the KV cache.
///
/// # Safety
/// All bits zero must be a value, and values must have nothing to drop.
pub(crate) unsafe trait KvLine: Column {
    /// Whether the numbers are multiples of a scale that is kept beside them.
    const SCALED: bool;
}

// SAFETY: plain numbers.
unsafe impl KvLine for F32x16 {
    const SCALED: bool = false;
}

// SAFETY: plain numbers.
unsafe impl KvLine for F16x16 {
    const SCALED: bool = false;
}

// SAFETY: plain numbers.
unsafe impl KvLine for Bf16x16 {
    const SCALED: bool = false;
}

// SAFETY: plain numbers.
unsafe impl KvLine for I8x16 {
    const SCALED: bool = true;
}

impl Column for I8x16 {
    const ZERO: Self = I8x16([0; 16]);

    fn set(&mut self, lane: usize, value: f32) {
        // The scale was rounded: the largest may come out a little above 127.
        self.0[lane] = value.round_ties_even().clamp(-127.0, 127.0) as i8;
    }

    fn from_floats(values: &[f32; 16]) -> Self {
        let mut out = Self::ZERO;
        for (lane, &value) in values.iter().enumerate() {
            out.set(lane, value);
        }
        out
    }

    fn set_from(&mut self, lane: usize, other: &Self, from: usize) {
        self.0[lane] = other.0[from];
    }

    fn get(&self, lane: usize) -> f32 {
        f32::from(self.0[lane])
    }

    #[inline(always)]
    fn load<V: Lanes>(&self, v: V) -> V::F {
        v.load_i8(self)
    }
}

/// The Walsh-Hadamard transform, orthonormal: it spreads a large element over its group, and products
/// of two groups stay the same when both are rotated (Ashkboos et al., QuaRot, 2024).
#[inline(always)]
pub(crate) fn rotate(group: &mut [f32; GROUP]) {
    for half in [1, 2, 4, 8] {
        for i in 0..GROUP {
            if i & half == 0 {
                let (a, b) = (group[i], group[i + half]);
                (group[i], group[i + half]) = (a + b, a - b);
            }
        }
    }
    for x in group {
        *x *= 0.25; // 1 / sqrt(16)
    }
}

/// The scale at which numbers up to the largest magnitude of `x` fit 8 bits, rounded to float16, and
/// what to multiply them with. The scale is NaN if a number is not finite, so that the fault shows in
/// everything that reads the position.
pub(super) fn int8_scale(x: &[f32]) -> (f32, f32) {
    let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if !x.iter().all(|x| x.is_finite()) {
        return (f32::NAN, 0.0);
    }
    let scale = f16::from_f32(max / 127.0).to_f32();
    match scale > 0.0 {
        true => (scale, 1.0 / scale),
        false => (0.0, 0.0),
    }
}
