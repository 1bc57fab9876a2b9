//! Quantised weights times many tokens, by the matrix unit.

use super::activations::{ActBlock, BLOCK};
use super::amx::{TileKernel, Tiles};
use super::lanes::{F32x16, I32x16, Lanes, Line};
use super::packed::PackedTimes;
use super::sweep::{Sweep, TOKENS};

/// Fewer tokens than this are not worth setting up the matrix unit.
pub(super) const MIN_TOKENS: usize = 8;

/// Panels that meet a tile of activations while it is in the first-level cache.
const SHARE: usize = 2;

/// Columns whose weights are bytes at the same time: those of `SHARE` panels, and the
/// activations of a tile's tokens, fit the first-level cache.
const CHUNK: usize = 512;

const ZERO: F32x16 = F32x16([0.0; 16]);

/// A task's share of a product. The sums of each group come out of the matrix unit; everything
/// after them is done as in [`PackedTimes`], in the same order, so the results have the same bits.
pub(super) struct TileSweep<'a, const BITS: u32, const GROUP: usize, const MIN: bool> {
    pub(super) sweep: Sweep<'a>,
    pub(super) times: PackedTimes<'a, BITS, GROUP, MIN>,
}

/// What the stages of a product hand on.
struct Buffers {
    /// Weights as signed bytes, four columns to a line.
    q: [[Line; CHUNK / 4]; SHARE],
    /// Outputs so far.
    acc: [[F32x16; TOKENS]; SHARE],
    /// Sums over a group: this one's, and the next one's that the matrix unit works on meanwhile.
    sums: [[I32x16; 16]; 2],
}

impl<const BITS: u32, const GROUP: usize, const MIN: bool> TileKernel
    for TileSweep<'_, BITS, GROUP, MIN>
{
    #[inline(always)]
    fn run<V: Lanes>(self, v: V, tiles: &Tiles) {
        let mut buffers = Buffers {
            q: [[Line([0; 64]); CHUNK / 4]; SHARE],
            acc: [[ZERO; TOKENS]; SHARE],
            sums: [[I32x16([0; 16]); 16]; 2],
        };
        let (panels, m) = (&self.sweep.panels, self.sweep.m);
        for first in (0..m).step_by(TOKENS) {
            let count = TOKENS.min(m - first);
            let tiled = count / MIN_TOKENS * MIN_TOKENS;
            for panel in panels.clone().step_by(SHARE) {
                let share = SHARE.min(panels.end - panel);
                self.tiled(v, tiles, (panel, share), (first, tiled), &mut buffers);
                for (i, acc) in buffers.acc[..share].iter().enumerate() {
                    for (t, acc) in acc[..tiled].iter().enumerate() {
                        self.sweep.store(panel + i, first + t, &acc.0);
                    }
                    let rest = first + tiled..first + count;
                    self.sweep.tokens(v, &self.times, panel + i, rest);
                }
            }
        }
    }
}

impl<const BITS: u32, const GROUP: usize, const MIN: bool> TileSweep<'_, BITS, GROUP, MIN> {
    const CHUNK_GROUPS: usize = CHUNK / GROUP;

    /// The outputs of `share` panels from `panel` on for `tokens`, a multiple of 8, from `first` on.
    #[inline(always)]
    fn tiled<V: Lanes>(
        &self,
        v: V,
        tiles: &Tiles,
        (panel, share): (usize, usize),
        (first, tokens): (usize, usize),
        buffers: &mut Buffers,
    ) {
        let groups = self.times.groups();
        for acc in &mut buffers.acc {
            acc[..tokens].fill(ZERO);
        }
        for start in (0..groups).step_by(Self::CHUNK_GROUPS) {
            let count = Self::CHUNK_GROUPS.min(groups - start);
            for (i, q) in buffers.q[..share].iter_mut().enumerate() {
                let at = (panel + i) * groups + start;
                for (g, q) in q.chunks_exact_mut(GROUP / 4).take(count).enumerate() {
                    self.times.unpack(v, at + g, q);
                }
            }
            let mut token = 0;
            while token < tokens {
                let wide = tokens - token >= 16;
                for i in 0..share {
                    let at = ((panel + i) * groups + start, count);
                    let (q, acc) = (&buffers.q[i], &mut buffers.acc[i]);
                    let x = (first + token, start);
                    let sums = &mut buffers.sums;
                    match acc[token..].first_chunk_mut() {
                        Some(acc) if wide => self.tile::<V, 16>(v, tiles, at, x, q, sums, acc),
                        _ => self.tile::<V, 8>(
                            v,
                            tiles,
                            at,
                            x,
                            q,
                            sums,
                            acc[token..].first_chunk_mut().expect("x"),
                        ),
                    }
                }
                token += if wide { 16 } else { 8 };
            }
        }
    }

    /// Adds the products of `count` groups of a panel, from group `at` of the matrix on, to the
    /// outputs of `T` tokens. `x` is the first token, and its first group.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn tile<V: Lanes, const T: usize>(
        &self,
        v: V,
        tiles: &Tiles,
        (at, count): (usize, usize),
        (token, start): (usize, usize),
        q: &[Line],
        sums: &mut [[I32x16; 16]; 2],
        acc: &mut [F32x16; T],
    ) {
        let per_block = BLOCK / GROUP;
        let stride = self.times.groups() / per_block;
        let x = &self.times.x[token * stride + start / per_block..];
        let mut rows: [&[ActBlock]; T] = [&[]; T];
        for (t, row) in rows.iter_mut().enumerate() {
            *row = &x[t * stride..][..count / per_block];
        }
        // Loops are written out: closures are compiled without the instruction set.
        let mut out = [v.splat(0.0); T];
        for t in 0..T {
            out[t] = v.load(&acc[t]);
        }
        let dots = |g: usize, sums: &mut [I32x16; 16]| {
            let (b, word) = (g / per_block, g % per_block * (GROUP / 4));
            let q = &q[g * (GROUP / 4)..][..GROUP / 4];
            let sums = sums.first_chunk_mut::<T>().expect("T is at most 16");
            tiles.dots::<T, GROUP>(&x[b..], stride, word, q, sums);
        };
        dots(0, &mut sums[0]);
        for g in 0..count {
            if g + 1 < count {
                dots(g + 1, &mut sums[(g + 1) % 2]);
            }
            let sums = &sums[g % 2];
            let mut own = [v.splat_i(0); T];
            for t in 0..T {
                own[t] = v.load_i(&sums[t]);
            }
            let block = (g / per_block, g % per_block);
            self.times.add(v, at + g, &own, &rows, block, &mut out);
        }
        for t in 0..T {
            acc[t] = v.store(out[t]);
        }
    }
}
