//! Paged causal attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! A query meets the tiles of its sequence one by one, from the one that holds the first position it
//! may see. All arithmetic of a query is its own: sharing a loaded tile between queries, cutting a
//! prompt into chunks, batching and block placement change the order of nothing, so they change no
//! bit.
//!
//! Per tile and query: 16 scores, each the sum over the head's elements, 16 by 16 from the first on;
//! the new maximum; e^(score - maximum); the old sum and output scaled by the change of the
//! maximum; the sum of the 16 weights in a fixed tree; the weighted values, position by position.
//! Of int8 keys, the sum over each 16 elements is multiplied by their scale; the scales of int8 values
//! multiply the weights.
//!
//! Loops over vectors are written out: closures, which `map` and `from_fn` take, are compiled without
//! the instruction set and so not inlined.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::kv::{GROUP, KvHead, KvLine, Pages, TILE, Tile, rotate};
use crate::linear::{Column, F32x16, Kernel, Lanes};
use crate::math::exp;
use crate::pool::Disjoint;

#[cfg(test)]
mod tests;

/// Largest head that fits the buffers below.
pub(crate) const MAX_HEAD_DIM: usize = 512;
const MAX_LINES: usize = MAX_HEAD_DIM / TILE;

/// How many tiles ahead a decode asks for the first-level cache and for the second-level one: the CPU
/// by itself looks no further than the page that it reads, and a tile is not much smaller. Queries of
/// a prompt share a tile while it is in the cache.
const NEAR: usize = 1;
const FAR: usize = 4;

/// Up to so many queries at once leave registers free, and their sums wait for each other's
/// additions: they meet [`WIDE`] groups of keys, or lines of values, side by side.
const FEW: usize = 4;
const WIDE: usize = 4;

/// The queries of some consecutive positions of one sequence that read the same key/value head.
pub(crate) struct Attention<'a, C> {
    pub(crate) kv: KvHead<'a, C>,
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

/// `N` queries on their way through the tiles, with room for heads of `LINES` lines.
struct Queries<const N: usize, const LINES: usize> {
    /// Their elements, scaled, a line for each group.
    q: [[F32x16; LINES]; N],
    max: [f32; N],
    sum: [f32; N],
    /// Weighted values so far.
    acc: [[F32x16; LINES]; N],
}

impl<C: KvLine> Kernel for Attention<'_, C> {
    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        // To clear more room than a head needs would cost time.
        match self.kv.dim() / TILE {
            ..=8 => self.run_with::<V, 8>(v),
            _ => self.run_with::<V, MAX_LINES>(v),
        }
    }
}

impl<C: KvLine> Attention<'_, C> {
    #[inline(always)]
    fn run_with<V: Lanes, const LINES: usize>(self, v: V) {
        let count = self.tokens * self.group;
        let mut first = 0;
        while first < count {
            first += match count - first {
                8.. if V::TOKENS >= 8 => self.queries::<V, 8, LINES>(v, first),
                4.. => self.queries::<V, 4, LINES>(v, first),
                3 => self.queries::<V, 3, LINES>(v, first),
                2 => self.queries::<V, 2, LINES>(v, first),
                _ => self.queries::<V, 1, LINES>(v, first),
            };
        }
    }

    /// Where query `i` lies in `queries` and `out`.
    #[inline(always)]
    fn offset(&self, i: usize) -> usize {
        let (token, head) = (self.token + i / self.group, self.head + i % self.group);
        (token * self.heads + head) * self.kv.dim()
    }

    /// Answers the `N` queries from `first` on; gives `N`.
    #[inline(always)]
    fn queries<V: Lanes, const N: usize, const LINES: usize>(&self, v: V, first: usize) -> usize {
        let dim = self.kv.dim();
        let mut queries = Queries::<N, LINES> {
            q: [[F32x16([0.0; TILE]); LINES]; N],
            max: [f32::NEG_INFINITY; N],
            sum: [0.0; N],
            acc: [[F32x16([0.0; TILE]); LINES]; N],
        };
        for n in 0..N {
            let query = &self.queries[self.offset(first + n)..][..dim];
            for (q, x) in queries.q[n].iter_mut().zip(query.as_chunks::<GROUP>().0) {
                let mut x = *x;
                if C::SCALED {
                    rotate(&mut x); // as the keys are
                }
                for (q, x) in q.0.iter_mut().zip(x) {
                    *q = x * self.scale;
                }
            }
        }
        // For each query the end of the positions that it sees, and the first.
        let (mut ends, mut oldest) = ([0; N], [0; N]);
        for n in 0..N {
            ends[n] = self.position + (first + n) / self.group + 1;
            oldest[n] = ends[n].saturating_sub(self.window);
        }
        let end = ends[N - 1];
        for start in (oldest[0] / TILE * TILE..end).step_by(TILE) {
            let mut soon = [start; 2];
            if self.tokens == 1 {
                // The last tiles ask for themselves, which costs nothing.
                soon[0] = (start + NEAR * TILE).min(end - 1);
                soon[1] = (start + FAR * TILE).min(end - 1);
            }
            let (keys, values) = self.kv.tile(self.pages, start, soon);
            let scores = queries.scores(v, keys);
            // What each query may see of the tile.
            let mut seen = [const { 0..0 }; N];
            for n in 0..N {
                let end = ends[n].saturating_sub(start).min(TILE);
                seen[n] = oldest[n].saturating_sub(start).min(end)..end;
            }
            let weights = queries.weights(v, dim / TILE, scores, &seen);
            // Later queries see no less at the end, earlier ones no less at the start.
            let shared = seen[N - 1].start..seen[0].end.max(seen[N - 1].start);
            queries.add_own(v, values, dim / TILE, &weights, &seen, 0..shared.start);
            queries.add(v, values, dim / TILE, &weights, shared.clone());
            queries.add_own(v, values, dim / TILE, &weights, &seen, shared.end..TILE);
        }
        for n in 0..N {
            let start = self.offset(first + n);
            // SAFETY: no other work has this token and head.
            let out = unsafe { self.out.slice(start..start + dim) };
            for (out, acc) in out.chunks_exact_mut(TILE).zip(&queries.acc[n]) {
                let values = out.iter_mut().zip(acc.0);
                values.for_each(|(out, a)| *out = a / queries.sum[n]);
            }
        }
        N
    }
}

impl<const N: usize, const LINES: usize> Queries<N, LINES> {
    /// Products with the sixteen keys of a tile.
    #[inline(always)]
    fn scores<V: Lanes, C: KvLine>(&self, v: V, tile: Tile<'_, C>) -> [V::F; N] {
        let groups = tile.lines.len() / GROUP;
        let mut scores = [v.splat(0.0); N];
        let mut group = 0;
        while N <= FEW && group + WIDE <= groups {
            self.add_scores::<V, C, WIDE>(v, tile, group, &mut scores);
            group += WIDE;
        }
        for group in group..groups {
            self.add_scores::<V, C, 1>(v, tile, group, &mut scores);
        }
        scores
    }

    /// Adds the products of `W` groups of elements, side by side.
    #[inline(always)]
    fn add_scores<V: Lanes, C: KvLine, const W: usize>(
        &self,
        v: V,
        tile: Tile<'_, C>,
        group: usize,
        scores: &mut [V::F; N],
    ) {
        let lines = &tile.lines[group * GROUP..][..W * GROUP];
        let mut q = [&self.q[0][..W]; N];
        for n in 0..N {
            q[n] = &self.q[n][group..][..W];
        }
        let mut sums = [[v.splat(0.0); N]; W];
        for i in 0..GROUP {
            for w in 0..W {
                if starts_cache_line::<C>(i * W + w) && N <= FEW {
                    tile.prefetch(v, group * GROUP + i * W + w);
                }
                let key = lines[w * GROUP + i].load(v);
                for n in 0..N {
                    sums[w][n] = v.mul_add(v.splat(q[n][w].0[i]), key, sums[w][n]);
                }
            }
        }
        for w in 0..W {
            let scale = match C::SCALED {
                true => {
                    tile.prefetch_scale(v, group + w);
                    tile.scales[group + w].load(v)
                }
                false => v.splat(1.0),
            };
            for n in 0..N {
                scores[n] = v.mul_add(sums[w][n], scale, scores[n]);
            }
        }
    }

    /// e^(score - maximum) of each position, after rescaling what came before.
    #[inline(always)]
    fn weights<V: Lanes>(
        &mut self,
        v: V,
        lines: usize,
        scores: [V::F; N],
        seen: &[Range<usize>; N],
    ) -> [F32x16; N] {
        let mut weights = [F32x16([0.0; TILE]); N];
        for n in 0..N {
            if seen[n].is_empty() {
                continue;
            }
            let mut own = v.store(scores[n]);
            if seen[n] != (0..TILE) {
                // What lies outside may be another sequence's leftovers.
                own.0[..seen[n].start].fill(f32::NEG_INFINITY);
                own.0[seen[n].end..].fill(f32::NEG_INFINITY);
            }
            let max = v.fold_max(v.load(&own)).max(self.max[n]);
            if max != self.max[n] {
                let change = exp(self.max[n] - max);
                self.sum[n] *= change;
                for acc in &mut self.acc[n][..lines] {
                    *acc = v.store(v.mul(v.load(acc), v.splat(change)));
                }
                self.max[n] = max;
            }
            for score in &mut own.0 {
                *score = exp(*score - max);
            }
            self.sum[n] += v.fold_add(v.load(&own));
            weights[n] = own;
        }
        weights
    }

    /// Adds the weighted values of positions of a tile that all queries see.
    #[inline(always)]
    fn add<V: Lanes, C: KvLine>(
        &mut self,
        v: V,
        values: Tile<'_, C>,
        lines: usize,
        weights: &[F32x16; N],
        positions: Range<usize>,
    ) {
        let mut line = 0;
        while N <= FEW && line + WIDE <= lines {
            let at = (line, lines);
            self.add_lines::<V, C, WIDE>(v, values, at, weights, positions.clone());
            line += WIDE;
        }
        for line in line..lines {
            self.add_lines::<V, C, 1>(v, values, (line, lines), weights, positions.clone());
        }
    }

    /// The same for `W` of `lines` lines from `line` on, side by side.
    #[inline(always)]
    fn add_lines<V: Lanes, C: KvLine, const W: usize>(
        &mut self,
        v: V,
        values: Tile<'_, C>,
        (line, lines): (usize, usize),
        weights: &[F32x16; N],
        positions: Range<usize>,
    ) {
        let mut scaled = [*weights; W];
        let mut sums = [[v.splat(0.0); N]; W];
        for w in 0..W {
            if C::SCALED {
                values.prefetch_scale(v, line + w);
            }
            for n in 0..N {
                if C::SCALED {
                    let scale = values.scales[line + w].load(v);
                    scaled[w][n] = v.store(v.mul(v.load(&weights[n]), scale));
                }
                sums[w][n] = v.load(&self.acc[n][line + w]);
            }
        }
        for position in positions {
            let own = &values.lines[position * lines + line..][..W];
            for w in 0..W {
                if starts_cache_line::<C>(w) && N <= FEW {
                    values.prefetch(v, position * lines + line + w);
                }
                let value = own[w].load(v);
                for n in 0..N {
                    let weights = if C::SCALED { &scaled[w] } else { weights };
                    let weight = v.splat(weights[n].0[position]);
                    sums[w][n] = v.mul_add(weight, value, sums[w][n]);
                }
            }
        }
        for w in 0..W {
            for n in 0..N {
                self.acc[n][line + w] = v.store(sums[w][n]);
            }
        }
    }

    /// The same for positions at an end of what they see: each query adds what it sees itself. A
    /// weight of 0 is not enough for the rest: leftovers may be infinite.
    #[inline(always)]
    fn add_own<V: Lanes, C: KvLine>(
        &mut self,
        v: V,
        values: Tile<'_, C>,
        lines: usize,
        weights: &[F32x16; N],
        seen: &[Range<usize>; N],
        positions: Range<usize>,
    ) {
        for n in 0..N {
            for position in seen[n].start.max(positions.start)..seen[n].end.min(positions.end) {
                let own = &values.lines[position * lines..][..lines];
                for (line, (acc, value)) in self.acc[n].iter_mut().zip(own).enumerate() {
                    let weight = weights[n].0[position] * values.scale(line, position);
                    *acc = v.store(v.mul_add(v.splat(weight), value.load(v), v.load(acc)));
                }
            }
        }
    }
}

/// Whether line `i` of a tile begins with a cache line, if line 0 does.
#[inline(always)]
const fn starts_cache_line<C>(i: usize) -> bool {
    (i * size_of::<C>()).is_multiple_of(64)
}
