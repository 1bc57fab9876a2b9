#![allow(clippy::unwrap_used)]

use spate_types::BlockId;

use super::*;
use crate::kv::KvPool;
use crate::linear::{Bf16x16, F16x16, I8x16, Isa};

const TOKENS: usize = 53;
const KV_HEADS: usize = 2;

fn shape(head_dim: usize) -> KvShape {
    KvShape {
        kv_heads: KV_HEADS,
        head_dim,
        blocks: 8,
        block_size: 32,
    }
}

/// Numbers in -1 .. 1 without a pattern.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let draw = |i| crate::philox::uniform(seed, i as u32) as f32 * 2.0 - 1.0;
    (0..count).map(draw).collect()
}

struct Input {
    group: usize,
    head_dim: usize,
    blocks: Vec<BlockId>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Input {
    fn new(group: usize, head_dim: usize) -> Self {
        let kv = TOKENS * KV_HEADS * head_dim;
        Self {
            group,
            head_dim,
            blocks: vec![BlockId(6), BlockId(1)],
            queries: numbers(1, kv * group),
            keys: numbers(2, kv),
            values: numbers(3, kv),
        }
    }

    fn pages(&self) -> Pages<'_> {
        Pages {
            first: 0,
            blocks: &self.blocks,
        }
    }

    fn pool<C: KvLine>(&self) -> KvPool<C> {
        let dim = self.head_dim;
        let shape = shape(dim);
        let mut pool = KvPool::new(std::iter::once((shape, false))).unwrap();
        for (h, head) in pool.layer_mut(0).heads.iter_mut().enumerate() {
            // Leftovers of another sequence, as bad as they can be.
            let bad = vec![f32::NAN; dim];
            (0..64).for_each(|p| head.append(&shape, self.pages(), p, &bad, &bad));
            for t in 0..TOKENS {
                let at = (t * KV_HEADS + h) * dim;
                let (key, value) = (&self.keys[at..at + dim], &self.values[at..at + dim]);
                head.append(&shape, self.pages(), t, key, value);
            }
        }
        pool
    }

    /// All queries, `tokens` at a time.
    fn attend<C: KvLine>(
        &self,
        isa: Isa,
        pool: &KvPool<C>,
        tokens: usize,
        window: usize,
    ) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.queries.len()];
        let disjoint = Disjoint::new(&mut out);
        for token in (0..TOKENS).step_by(tokens) {
            for kv_head in 0..KV_HEADS {
                isa.run(Attention {
                    shape: &pool.layer(0).shape,
                    kv: &pool.layer(0).heads[kv_head],
                    pages: self.pages(),
                    queries: &self.queries,
                    out: &disjoint,
                    token,
                    position: token,
                    tokens: tokens.min(TOKENS - token),
                    heads: KV_HEADS * self.group,
                    head: kv_head * self.group,
                    group: self.group,
                    scale: 0.7,
                    window,
                });
            }
        }
        out
    }

    /// Close to what it should be, and the same on every instruction set in chunks of any size.
    fn check<C: KvLine>(&self, window: usize, want: &[f64], tolerance: f64) {
        let pool = self.pool::<C>();
        let whole = self.attend(Isa::best(), &pool, TOKENS, window);
        let name = std::any::type_name::<C>();
        let what = format!("group {}, window {window}, {name}", self.group);
        let off = furthest(&whole, want);
        assert!(off < tolerance, "{what}: {off}");
        for isa in Isa::available() {
            for tokens in [1, 2, 7, 16] {
                let got = self.attend(isa, &pool, tokens, window);
                assert_eq!(got, whole, "{} by {tokens}, {what}", isa.name());
            }
        }
    }

    /// Softmax attention as its definition says, in float64.
    fn reference(&self, window: usize) -> Vec<f64> {
        let dim = self.head_dim;
        let heads = KV_HEADS * self.group;
        let mut out = Vec::new();
        for (i, q) in self.queries.chunks_exact(dim).enumerate() {
            let (token, kv_head) = (i / heads, i % heads / self.group);
            let of = |data: &[f32], t: usize, d: usize| {
                f64::from(data[(t * KV_HEADS + kv_head) * dim + d])
            };
            let score = |t: usize| -> f64 {
                let products = q.iter().enumerate();
                let sum: f64 = products
                    .map(|(d, &q)| f64::from(q) * of(&self.keys, t, d))
                    .sum();
                (sum * 0.7).exp()
            };
            let first = (token + 1).saturating_sub(window);
            let weights: Vec<f64> = (first..=token).map(score).collect();
            let sum: f64 = weights.iter().sum();
            out.extend((0..dim).map(|d| {
                let values = weights.iter().enumerate();
                values
                    .map(|(t, w)| w * of(&self.values, first + t, d))
                    .sum::<f64>()
                    / sum
            }));
        }
        out
    }
}

fn furthest(got: &[f32], want: &[f64]) -> f64 {
    let differences = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).abs());
    differences.fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}

#[test]
fn close_to_float64_and_equal_on_every_path() {
    for (group, head_dim) in [(1, 16), (3, 64), (5, 48), (8, 32)] {
        for window in [usize::MAX, 1, 16, 21] {
            let input = Input::new(group, head_dim);
            let want = input.reference(window);
            input.check::<F32x16>(window, &want, 2e-6);
            input.check::<F16x16>(window, &want, 2e-3);
            input.check::<Bf16x16>(window, &want, 2e-2);
            input.check::<I8x16>(window, &want, 2e-2);
        }
    }
}
