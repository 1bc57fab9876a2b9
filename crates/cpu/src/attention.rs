//! Paged causal attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! A query meets the tiles of its sequence one by one, from the one that holds the first position it
//! may see. All arithmetic of a query is its own: sharing a loaded tile between queries, cutting a
//! prompt into chunks, batching and block placement change the order of nothing, so they change no
//! bit.
//!
//! Per tile and query: 16 scores, each the sum over the head's elements from the first to the last;
//! the new maximum; e^(score - maximum); the old sum and output scaled by the change of the
//! maximum; the sum of the 16 weights in a fixed tree; the weighted values, position by position.
//! Of int8 keys, the sum over each group of elements is multiplied by the group's scale and added to
//! the score; the scales of int8 values multiply the weights.
//!
//! Loops over vectors are written out: closures, which `map` and `from_fn` take, are compiled without
//! the instruction set and so not inlined.

use std::ops::Range;

use crate::kv::{GROUP, HeadPool, KvLine, KvShape, Pages, TILE, Tile, rotate};
use crate::linear::{Column, F32x16, Kernel, Lanes};
use crate::math::exp;
use crate::pool::Disjoint;

#[cfg(test)]
mod tests;

/// Largest head that fits the buffers below.
pub(crate) const MAX_HEAD_DIM: usize = 512;
const MAX_LINES: usize = MAX_HEAD_DIM / TILE;

/// The queries of some consecutive positions of one sequence that read the same key/value head.
pub(crate) struct Attention<'a, C> {
    pub(crate) shape: &'a KvShape,
    pub(crate) kv: &'a HeadPool<C>,
    pub(crate) pages: Pages<'a>,
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
    /// Positions that a query sees, its own included.
    pub(crate) window: usize,
}

/// `N` queries on their way through the tiles.
struct Queries<const N: usize> {
    /// Their elements, scaled, `[element][query]`: one element of all is one step of the scores.
    q: [[f32; N]; MAX_HEAD_DIM],
    max: [f32; N],
    sum: [f32; N],
    /// Weighted values so far.
    acc: [[F32x16; N]; MAX_LINES],
}

impl<C: KvLine> Kernel for Attention<'_, C> {
    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let count = self.tokens * self.group;
        let mut first = 0;
        while first < count {
            first += match count - first {
                8.. if V::TOKENS >= 8 => self.queries::<V, 8>(v, first),
                4.. => self.queries::<V, 4>(v, first),
                3 => self.queries::<V, 3>(v, first),
                2 => self.queries::<V, 2>(v, first),
                _ => self.queries::<V, 1>(v, first),
            };
        }
    }
}

impl<C: KvLine> Attention<'_, C> {
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
        let mut queries = Queries {
            q: [[0.0; N]; MAX_HEAD_DIM],
            max: [f32::NEG_INFINITY; N],
            sum: [0.0; N],
            acc: [[F32x16([0.0; TILE]); N]; MAX_LINES],
        };
        for n in 0..N {
            let query = &self.queries[self.offset(first + n)..][..dim];
            let groups = queries.q.chunks_exact_mut(GROUP);
            for (q, x) in groups.zip(query.as_chunks::<GROUP>().0) {
                let mut x = *x;
                if C::SCALED {
                    rotate(&mut x); // as the keys are
                }
                for (q, x) in q.iter_mut().zip(x) {
                    q[n] = x * self.scale;
                }
            }
        }
        let position = |n: usize| self.position + (first + n) / self.group;
        let oldest = |n: usize| (position(n) + 1).saturating_sub(self.window);
        let first_tile = oldest(0) / TILE * TILE;
        for start in (first_tile..=position(N - 1)).step_by(TILE) {
            let (keys, values) = self.kv.tile(self.shape, self.pages, start);
            let scores = queries.scores(v, keys);
            // What each query may see of the tile.
            let seen = std::array::from_fn(|n| {
                let end = (position(n) + 1).saturating_sub(start).min(TILE);
                oldest(n).saturating_sub(start).min(end)..end
            });
            let weights = queries.weights(v, dim / TILE, scores, &seen);
            if seen[0].end == TILE && seen[N - 1].start == 0 {
                queries.add(v, values, dim / TILE, &weights);
            } else {
                queries.add_seen(v, values, dim / TILE, &weights, &seen);
            }
        }
        for n in 0..N {
            let start = self.offset(first + n);
            // SAFETY: no other work has this token and head.
            let out = unsafe { self.out.slice(start..start + dim) };
            for (out, acc) in out.chunks_exact_mut(TILE).zip(&queries.acc) {
                let values = out.iter_mut().zip(acc[n].0);
                values.for_each(|(out, a)| *out = a / queries.sum[n]);
            }
        }
        N
    }
}

impl<const N: usize> Queries<N> {
    #[inline(always)]
    fn scores<V: Lanes, C: KvLine>(&self, v: V, keys: Tile<'_, C>) -> [V::F; N] {
        let mut scores = [v.splat(0.0); N];
        if C::SCALED {
            let groups = keys.lines.chunks_exact(GROUP).zip(keys.scales);
            for ((keys, scale), q) in groups.zip(self.q.chunks_exact(GROUP)) {
                let sums = sums(v, keys, q, [v.splat(0.0); N]);
                let scale = scale.load(v);
                for n in 0..N {
                    scores[n] = v.mul_add(sums[n], scale, scores[n]);
                }
            }
            scores
        } else {
            sums(v, keys.lines, &self.q, scores)
        }
    }

    /// e^(score - maximum) of each position, `[position][query]`, after rescaling what came before.
    #[inline(always)]
    fn weights<V: Lanes>(
        &mut self,
        v: V,
        lines: usize,
        scores: [V::F; N],
        seen: &[Range<usize>; N],
    ) -> [[f32; N]; TILE] {
        let mut weights = [[0.0; N]; TILE];
        for n in 0..N {
            if seen[n].is_empty() {
                continue;
            }
            let mut scores = v.store(scores[n]).0;
            if seen[n] != (0..TILE) {
                // What lies outside may be another sequence's leftovers.
                scores[..seen[n].start].fill(f32::NEG_INFINITY);
                scores[seen[n].end..].fill(f32::NEG_INFINITY);
            }
            let max = fold(&scores, f32::max).max(self.max[n]);
            if max != self.max[n] {
                let change = exp(self.max[n] - max);
                self.sum[n] *= change;
                for acc in &mut self.acc[..lines] {
                    acc[n] = v.store(v.mul(v.load(&acc[n]), v.splat(change)));
                }
                self.max[n] = max;
            }
            for score in &mut scores {
                *score = exp(*score - max);
            }
            self.sum[n] += fold(&scores, |a, b| a + b);
            for (weights, own) in weights.iter_mut().zip(scores) {
                weights[n] = own;
            }
        }
        weights
    }

    /// Adds the weighted values of a tile that all queries see.
    #[inline(always)]
    fn add<V: Lanes, C: KvLine>(
        &mut self,
        v: V,
        values: Tile<'_, C>,
        lines: usize,
        weights: &[[f32; N]; TILE],
    ) {
        for (line, acc) in self.acc[..lines].iter_mut().enumerate() {
            let mut sums = [v.splat(0.0); N];
            for n in 0..N {
                sums[n] = v.load(&acc[n]);
            }
            let scales = match C::SCALED {
                true => v.store(values.scales[line].load(v)).0,
                false => [1.0; TILE],
            };
            let column = values.lines[line..].iter().step_by(lines);
            for ((value, weights), scale) in column.zip(weights).zip(scales) {
                let value = value.load(v);
                for n in 0..N {
                    sums[n] = v.mul_add(v.splat(weights[n] * scale), value, sums[n]);
                }
            }
            for n in 0..N {
                acc[n] = v.store(sums[n]);
            }
        }
    }

    /// The same for a tile at an end of what they see. A weight of 0 is not enough there: leftovers
    /// may be infinite.
    #[inline(always)]
    fn add_seen<V: Lanes, C: KvLine>(
        &mut self,
        v: V,
        values: Tile<'_, C>,
        lines: usize,
        weights: &[[f32; N]; TILE],
        seen: &[Range<usize>; N],
    ) {
        for n in 0..N {
            let seen = seen[n].clone();
            for position in seen {
                let own = &values.lines[position * lines..][..lines];
                for (line, (acc, value)) in self.acc.iter_mut().zip(own).enumerate() {
                    let weight = weights[position][n] * values.scale(line, position);
                    let sum = v.mul_add(v.splat(weight), value.load(v), v.load(&acc[n]));
                    acc[n] = v.store(sum);
                }
            }
        }
    }
}

/// What products of `q`, one element of all queries after the other, with the elements of sixteen
/// keys add to `sums`.
#[inline(always)]
fn sums<V: Lanes, C: KvLine, const N: usize>(
    v: V,
    keys: &[C],
    q: &[[f32; N]],
    mut sums: [V::F; N],
) -> [V::F; N] {
    for (key, q) in keys.iter().zip(q) {
        let key = key.load(v);
        for n in 0..N {
            sums[n] = v.mul_add(v.splat(q[n]), key, sums[n]);
        }
    }
    sums
}

/// Halves against halves: a fixed order that takes few steps.
#[inline(always)]
fn fold(values: &[f32; TILE], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut values = *values;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            values[i] = f(values[i], values[i + half]);
        }
    }
    values[0]
}
