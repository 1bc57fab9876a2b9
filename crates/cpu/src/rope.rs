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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::Isa;

    const DIM: usize = 8;

    fn rotate(x: &mut [f32], rope: &Rope, position: f64, norm: Option<(&[f32], f32)>) {
        let angles = rates(rope, None).into_iter().map(|rate| rate * position);
        let rotations: Vec<_> = angles.map(|a| (a.cos() as f32, a.sin() as f32)).collect();
        Isa::best().run(NormRotate {
            width: x.len(),
            x,
            head_dim: DIM,
            rotations: &rotations,
            pairing: rope.pairing,
            norm,
        });
    }

    fn rope(pairing: RopePairing, dims: usize) -> Rope {
        Rope {
            pairing,
            dims,
            base: 100.0,
            linear_factor: 1.0,
        }
    }

    #[test]
    fn rates_follow_base_factors_and_scale() {
        let mut rope = rope(RopePairing::Halves, 4);
        assert_eq!(rates(&rope, None), [1.0, 0.1]);
        assert_eq!(rates(&rope, Some(&[1.0, 4.0])), [1.0, 0.025]);
        rope.linear_factor = 2.0;
        assert_eq!(rates(&rope, None), [0.5, 0.05]);
    }

    #[test]
    fn the_pairing_says_which_elements_turn_together() {
        // Position 1 turns the first pair by one radian, the second by a tenth.
        let turned = |pairing| {
            let mut x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
            rotate(&mut x, &rope(pairing, 4), 1.0, None);
            x
        };
        let pair = |a: f64, b: f64, angle: f64| {
            let (sin, cos) = angle.sin_cos();
            [a * cos - b * sin, a * sin + b * cos]
        };
        let check = |got: [f32; 8], at: [usize; 4]| {
            let values = [
                pair((at[0] + 1) as f64, (at[1] + 1) as f64, 1.0),
                pair((at[2] + 1) as f64, (at[3] + 1) as f64, 0.1),
            ];
            for (i, want) in at.into_iter().zip(values.concat()) {
                assert!(
                    (f64::from(got[i]) - want).abs() < 1e-6,
                    "element {i}: {got:?}"
                );
            }
            assert_eq!(got[4..], [5.0, 6.0, 7.0, 8.0], "behind the rotated dims");
        };
        check(turned(RopePairing::Interleaved), [0, 1, 2, 3]);
        check(turned(RopePairing::Halves), [0, 2, 1, 3]);
    }

    #[test]
    fn each_head_is_normalised_by_itself() {
        let mut x = [3.0; 2 * DIM];
        x[DIM..].fill(-200.0);
        rotate(
            &mut x,
            &rope(RopePairing::Halves, 8),
            0.0,
            Some((&[2.0; DIM], 0.0)),
        );
        assert_eq!(x[..DIM], [2.0; DIM]);
        assert_eq!(x[DIM..], [-2.0; DIM]);
    }
}
