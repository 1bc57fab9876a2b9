use spate_model::{ModelConfig, RopePairing, Rotation};

use crate::linear::{Kernel, Lanes};
use crate::math::rms_norm_in_place;

/// The rotary embeddings of a model: layers have one of very few.
pub(crate) struct Ropes {
    pub(crate) rotations: Vec<Rotation>,
    /// For each layer, an index into `rotations`.
    pub(crate) of_layer: Vec<usize>,
}

impl Ropes {
    pub(crate) fn new(config: &ModelConfig, max_seq_len: usize) -> Self {
        let mut rotations: Vec<Rotation> = Vec::new();
        let of_layer = (0..config.layers).map(|layer| {
            let rotation = config.rope(layer).rotation(max_seq_len);
            let known = rotations.iter().position(|r| *r == rotation);
            known.unwrap_or_else(|| {
                rotations.push(rotation);
                rotations.len() - 1
            })
        });
        let of_layer = of_layer.collect();
        Self {
            rotations,
            of_layer,
        }
    }
}

/// Appends cosine and sine, times the magnitude, of each pair's angle at each position.
pub(crate) fn turn(rotation: &Rotation, positions: &[u32], out: &mut Vec<(f32, f32)>) {
    for &position in positions {
        let angles = rotation.rates.iter().map(|rate| f64::from(position) * rate);
        out.extend(angles.map(|angle| {
            let (sin, cos) = angle.sin_cos();
            let scaled = |x: f64| (x * rotation.magnitude) as f32;
            (scaled(cos), scaled(sin))
        }));
    }
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
    use spate_model::{Rope, RopeScaling};

    const DIM: usize = 8;

    fn rotate(x: &mut [f32], rope: &Rope, position: u32, norm: Option<(&[f32], f32)>) {
        let mut rotations = Vec::new();
        turn(&rope.rotation(1), &[position], &mut rotations);
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
            scaling: RopeScaling::None,
        }
    }

    #[test]
    fn the_pairing_says_which_elements_turn_together() {
        // Position 1 turns the first pair by one radian, the second by a tenth.
        let turned = |pairing| {
            let mut x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
            rotate(&mut x, &rope(pairing, 4), 1, None);
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
            0,
            Some((&[2.0; DIM], 0.0)),
        );
        assert_eq!(x[..DIM], [2.0; DIM]);
        assert_eq!(x[DIM..], [-2.0; DIM]);
    }
}
