#![allow(clippy::unwrap_used)]

use spate_types::BlockId;

use super::*;
use crate::ThreadPool;
use crate::kv::{KvPools, KvShape};
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

    fn pools<C: KvLine>(&self) -> KvPools<C> {
        let shape = shape(self.head_dim);
        let mut kv = KvPools::new([shape; 2], &[false]).unwrap();
        let threads = ThreadPool::new(2).unwrap();
        let place = |token| (self.pages(), token);
        // Leftovers of another sequence, as bad as they can be.
        let bad = vec![f32::NAN; 64 * KV_HEADS * self.head_dim];
        kv.append(&threads, 0, place, &bad, &bad);
        kv.append(&threads, 0, place, &self.keys, &self.values);
        kv
    }

    /// All queries, `tokens` at a time.
    fn attend<C: KvLine>(
        &self,
        isa: Isa,
        kv: &KvPools<C>,
        tokens: usize,
        window: usize,
    ) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.queries.len()];
        let disjoint = Disjoint::new(&mut out);
        for token in (0..TOKENS).step_by(tokens) {
            for kv_head in 0..KV_HEADS {
                isa.run(Attention {
                    kv: kv.head(0, kv_head),
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
        let kv = self.pools::<C>();
        let whole = self.attend(Isa::best(), &kv, TOKENS, window);
        let name = std::any::type_name::<C>();
        let what = format!("group {}, window {window}, {name}", self.group);
        let off = furthest(&whole, want);
        assert!(off < tolerance, "{what}: {off}");
        for isa in Isa::available() {
            for tokens in [1, 2, 7, 16] {
                let got = self.attend(isa, &kv, tokens, window);
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
