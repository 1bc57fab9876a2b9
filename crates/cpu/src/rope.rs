use spate_model::{Rope, RopePairing};

use crate::linear::{Kernel, Lanes};
use crate::math::rms_norm_in_place;

/// Radians by which each pair turns per position; `factors` divide them (Llama 3's scaling).
pub(crate) fn rates(rope: &Rope, factors: Option<&[f32]>) -> Vec<f64> {
    (0..rope.dims / 2)
        .map(|i| {
            let exponent = -2.0 * i as f64 / rope.dims as f64;
            let factor = factors.map_or(1.0, |f| f64::from(f[i]));
            f64::from(rope.base).powf(exponent) / factor / f64::from(rope.linear_factor)
        })
        .collect()
}

/// Normalises (if there is a norm) and rotates all heads of consecutive tokens.
pub(crate) struct NormRotate<'a> {
    /// `[tokens, heads * head_dim]`
    pub(crate) x: &'a mut [f32],
    /// Heads of one token times `head_dim`.
    pub(crate) width: usize,
    pub(crate) head_dim: usize,
    /// `[tokens][dims / 2]`
    pub(crate) rotations: &'a [(f32, f32)],
    pub(crate) pairing: RopePairing,
    pub(crate) norm: Option<(&'a [f32], f32)>,
}

impl Kernel for NormRotate<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, _: V) {
        let tokens = self.x.len() / self.width;
        let pairs = self.rotations.len() / tokens;
        let tokens = self.x.chunks_exact_mut(self.width);
        for (heads, rotations) in tokens.zip(self.rotations.chunks_exact(pairs)) {
            for head in heads.chunks_exact_mut(self.head_dim) {
                if let Some((norm, eps)) = self.norm {
                    rms_norm_in_place(head, norm, eps);
                }
                match self.pairing {
                    RopePairing::Interleaved => {
                        for (pair, &(cos, sin)) in
                            head.as_chunks_mut::<2>().0.iter_mut().zip(rotations)
                        {
                            let [a, b] = *pair;
                            *pair = [a * cos - b * sin, a * sin + b * cos];
                        }
                    }
                    RopePairing::Halves => {
                        let (first, second) = head[..2 * pairs].split_at_mut(pairs);
                        let both = first.iter_mut().zip(second);
                        for ((x, y), &(cos, sin)) in both.zip(rotations) {
                            let (a, b) = (*x, *y);
                            (*x, *y) = (a * cos - b * sin, a * sin + b * cos);
                        }
                    }
                }
            }
        }
    }
}
