//! Paged causal attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! A query meets the tiles of its sequence one by one from position 0 on. All arithmetic of a query
//! is its own: sharing a loaded tile between queries, cutting a prompt into chunks, batching and
//! block placement change the order of nothing, so they change no bit.
//!
//! Per tile and query: 16 scores, each the sum over the head's elements from the first to the last;
//! the new maximum; e^(score - maximum); the old sum and output scaled by the change of the
//! maximum; the sum of the 16 weights from left to right; the weighted values, position by position.

use spate_types::BlockId;

use crate::kv::{HeadPool, KvShape, TILE};
use crate::linear::{Column, F32x16, Kernel, Lanes};
use crate::math::exp;
use crate::pool::Disjoint;

/// Largest head that fits the buffers below.
pub(crate) const MAX_HEAD_DIM: usize = 512;
const MAX_LINES: usize = MAX_HEAD_DIM / TILE;

/// The queries of some consecutive positions of one sequence that read the same key/value head.
pub(crate) struct Attention<'a, C> {
    pub(crate) shape: &'a KvShape,
    pub(crate) kv: &'a HeadPool<C>,
    pub(crate) blocks: &'a [BlockId],
    /// `[tokens of the step, heads * head_dim]`
    pub(crate) queries: &'a [f32],
    /// As `queries`; this work writes the elements of its own tokens and heads only.
    pub(crate) out: &'a Disjoint<'a, f32>,
    /// First token of the step that asks, and its position.
    pub(crate) token: usize,
    pub(crate) position: usize,
    pub(crate) tokens: usize,
    /// Heads of a token.
    pub(crate) heads: usize,
    /// First head that asks, and how many do.
    pub(crate) head: usize,
    pub(crate) group: usize,
    pub(crate) scale: f32,
}

/// A query on its way through the tiles.
#[derive(Clone, Copy)]
struct Query<'a> {
    /// Not yet scaled.
    q: &'a [f32],
    position: usize,
    max: f32,
    sum: f32,
}

impl<C: Column> Kernel for Attention<'_, C> {
    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let count = self.tokens * self.group;
        let mut first = 0;
        while first < count {
            first += match count - first {
                8.. if V::TOKENS >= 8 => self.queries::<V, 8>(v, first),
                4.. => self.queries::<V, 4>(v, first),
                2.. => self.queries::<V, 2>(v, first),
                _ => self.queries::<V, 1>(v, first),
            };
        }
    }
}

impl<C: Column> Attention<'_, C> {
    /// Where query `i` lies in `queries` and `out`.
    #[inline(always)]
    fn offset(&self, i: usize) -> usize {
        let (token, head) = (self.token + i / self.group, self.head + i % self.group);
        (token * self.heads + head) * self.shape.head_dim
    }

    /// Answers the `N` queries from `first` on; gives `N`.
    #[inline(always)]
    fn queries<V: Lanes, const N: usize>(&self, v: V, first: usize) -> usize {
        let dim = self.shape.head_dim;
        let lines = dim / TILE;
        let mut queries: [Query<'_>; N] = std::array::from_fn(|n| Query {
            q: &self.queries[self.offset(first + n)..][..dim],
            position: self.position + (first + n) / self.group,
            max: f32::NEG_INFINITY,
            sum: 0.0,
        });
        let mut acc = [[F32x16([0.0; TILE]); MAX_LINES]; N];
        let (earliest, latest) = (queries[0].position, queries[N - 1].position);
        for start in (0..=latest).step_by(TILE) {
            let (keys, values) = self.kv.tile(self.shape, self.blocks, start);
            if start + TILE - 1 <= earliest {
                self.tile::<V, N>(v, &mut queries, &mut acc, keys, values, TILE);
                continue;
            }
            // Some query must not see all of the tile: one by one.
            for (query, acc) in queries.iter_mut().zip(&mut acc) {
                let seen = (query.position + 1).saturating_sub(start).min(TILE);
                if seen > 0 {
                    let (query, acc) = (std::array::from_mut(query), std::array::from_mut(acc));
                    self.tile::<V, 1>(v, query, acc, keys, values, seen);
                }
            }
        }
        for (n, (query, acc)) in queries.iter().zip(&acc).enumerate() {
            let start = self.offset(first + n);
            // SAFETY: no other work has this token and head.
            let out = unsafe { self.out.slice(start..start + dim) };
            for (out, acc) in out.chunks_exact_mut(TILE).zip(&acc[..lines]) {
                out.iter_mut()
                    .zip(acc.0)
                    .for_each(|(out, a)| *out = a / query.sum);
            }
        }
        N
    }

    /// Lets `N` queries meet the first `seen` positions of a tile.
    #[inline(always)]
    fn tile<V: Lanes, const N: usize>(
        &self,
        v: V,
        queries: &mut [Query<'_>; N],
        acc: &mut [[F32x16; MAX_LINES]; N],
        keys: &[C],
        values: &[C],
        seen: usize,
    ) {
        let weights = self.weights(v, queries, acc, keys, seen);
        let lines = self.shape.head_dim / TILE;
        for line in 0..lines {
            let mut sums = [v.splat(0.0); N];
            for n in 0..N {
                sums[n] = v.load(&acc[n][line]);
            }
            for j in 0..seen {
                let value = values[j * lines + line].load(v);
                for n in 0..N {
                    sums[n] = v.mul_add(v.splat(weights[n][j]), value, sums[n]);
                }
            }
            for n in 0..N {
                acc[n][line] = v.store(sums[n]);
            }
        }
    }

    /// e^(score - maximum) of each position, after rescaling what came before.
    #[inline(always)]
    fn weights<V: Lanes, const N: usize>(
        &self,
        v: V,
        queries: &mut [Query<'_>; N],
        acc: &mut [[F32x16; MAX_LINES]; N],
        keys: &[C],
        seen: usize,
    ) -> [[f32; TILE]; N] {
        let mut scores = [v.splat(0.0); N];
        for (d, key) in keys.iter().enumerate() {
            let key = key.load(v);
            for n in 0..N {
                scores[n] = v.mul_add(v.splat(queries[n].q[d]), key, scores[n]);
            }
        }
        let lines = keys.len() / TILE;
        std::array::from_fn(|n| {
            let query = &mut queries[n];
            let mut weights = v.store(v.mul(scores[n], v.splat(self.scale))).0;
            // What lies behind the query's own position may be another sequence's leftovers.
            weights[seen..].fill(f32::NEG_INFINITY);
            let max = weights.iter().fold(query.max, |max, &w| max.max(w));
            if max != query.max {
                let change = exp(query.max - max);
                query.sum *= change;
                let change = v.splat(change);
                for line in &mut acc[n][..lines] {
                    *line = v.store(v.mul(v.load(line), change));
                }
                query.max = max;
            }
            for w in &mut weights {
                *w = exp(*w - max);
            }
            query.sum += weights.iter().sum::<f32>();
            weights
        })
    }
}
