//! Quantised weights times many tokens, by the matrix unit.

use super::activations::{ActTile, BLOCK, TILE_TOKENS};
use super::amx::{TileKernel, Tiles};
use super::lanes::{F32x16, I32x16, Lanes, Line};
use super::packed::{PackedTimes, Scales};
use super::sweep::{Sweep, TOKENS};

/// Panels that meet a tile of activations while it is in the first-level cache.
const SHARE: usize = 2;

/// Columns whose weights are bytes at the same time: those of `SHARE` panels, and the activations of
/// a tile, fit the first-level cache.
const CHUNK: usize = 512;

const ZERO: F32x16 = F32x16([0.0; 16]);

/// A task's share of a product. The sums of each group come out of the matrix unit; everything
/// after them is done as for few tokens, in the same order, so the results have the same bits.
pub(super) struct TileSweep<'a, const BITS: u32, const GROUP: usize, const MIN: bool> {
    pub(super) sweep: Sweep<'a>,
    pub(super) times: PackedTimes<'a, BITS, GROUP, MIN>,
    /// `[m / 16, cols / 32]`
    pub(super) x: &'a [ActTile],
}

/// What the stages of a product hand on.
struct Buffers {
    /// Weights as signed bytes, four columns to a line.
    q: [[Line; CHUNK / 4]; SHARE],
    /// Outputs of each panel so far, while there are more columns to come.
    out: [[[F32x16; TILE_TOKENS]; TOKENS / TILE_TOKENS]; SHARE],
    /// Sums over a group, and over the next one, that the matrix unit works on meanwhile.
    sums: [[I32x16; TILE_TOKENS]; 2],
}

/// Columns of a panel and of a tile of tokens that are multiplied in one go.
struct Part<'a> {
    panel: usize,
    /// First of the panel's groups.
    start: usize,
    /// First token.
    token: usize,
    x: &'a [ActTile],
}

impl<const BITS: u32, const GROUP: usize, const MIN: bool> TileKernel
    for TileSweep<'_, BITS, GROUP, MIN>
{
    #[inline(always)]
    fn run<V: Lanes>(self, v: V, tiles: &Tiles) {
        let mut buffers = Buffers {
            q: [[Line([0; 64]); CHUNK / 4]; SHARE],
            out: [[[ZERO; TILE_TOKENS]; TOKENS / TILE_TOKENS]; SHARE],
            sums: [[I32x16([0; 16]); TILE_TOKENS]; 2],
        };
        let (panels, m) = (&self.sweep.panels, self.sweep.m);
        for first in (0..m).step_by(TOKENS) {
            for panel in panels.clone().step_by(SHARE) {
                let share = SHARE.min(panels.end - panel);
                self.products(v, tiles, (panel, share), first, &mut buffers);
            }
        }
    }
}

impl<const BITS: u32, const GROUP: usize, const MIN: bool> TileSweep<'_, BITS, GROUP, MIN> {
    /// The outputs of `share` panels from `panel` on for `TOKENS` tokens from `first` on.
    #[inline(always)]
    fn products<V: Lanes>(
        &self,
        v: V,
        tiles: &Tiles,
        (panel, share): (usize, usize),
        first: usize,
        buffers: &mut Buffers,
    ) {
        let groups = self.times.groups();
        let blocks = groups * GROUP / BLOCK;
        let end = self.sweep.m.min(first + TOKENS);
        for start in (0..groups).step_by(CHUNK / GROUP) {
            let count = (CHUNK / GROUP).min(groups - start);
            for (i, q) in buffers.q[..share].iter_mut().enumerate() {
                let group = (panel + i) * groups + start;
                for (g, q) in q.chunks_exact_mut(GROUP / 4).take(count).enumerate() {
                    self.times.unpack(v, group + g, q);
                }
            }
            for (tile, token) in (first..end).step_by(TILE_TOKENS).enumerate() {
                let x = token / TILE_TOKENS * blocks + start * GROUP / BLOCK;
                let x = &self.x[x..][..count * GROUP / BLOCK];
                for i in 0..share {
                    let panel = panel + i;
                    let part = Part {
                        panel,
                        start,
                        token,
                        x,
                    };
                    let (q, out, sums) =
                        (&buffers.q[i], &mut buffers.out[i][tile], &mut buffers.sums);
                    if end - token > TILE_TOKENS / 2 {
                        self.add::<V, TILE_TOKENS>(v, tiles, part, q, out, sums);
                    } else {
                        self.add::<V, { TILE_TOKENS / 2 }>(v, tiles, part, q, out, sums);
                    }
                }
            }
        }
    }

    /// Adds the products of a part to the outputs of the first `T` tokens of its tile.
    #[inline(always)]
    fn add<V: Lanes, const T: usize>(
        &self,
        v: V,
        tiles: &Tiles,
        Part {
            panel,
            start,
            token,
            x,
        }: Part<'_>,
        q: &[Line],
        out: &mut [F32x16; TILE_TOKENS],
        sums: &mut [[I32x16; TILE_TOKENS]; 2],
    ) {
        let mut acc = [v.splat(0.0); T];
        if start > 0 {
            for t in 0..T {
                acc[t] = v.load(&out[t]);
            }
        }
        let per_block = BLOCK / GROUP;
        let groups = x.len() * per_block;
        for g in 0..=groups {
            if g < groups {
                let q = &q[g * (GROUP / 4)..][..GROUP / 4];
                let sums = &mut sums[g % 2];
                tiles.dots::<T, GROUP>(&x[g / per_block], g % per_block, q, sums);
            }
            if let Some(g) = g.checked_sub(1) {
                let mut dots = [v.splat_i(0); T];
                for t in 0..T {
                    dots[t] = v.load_i(&sums[g % 2][t]);
                }
                let span = PackedTimes::<BITS, GROUP, MIN>::span(g % per_block);
                let scales = TileScales(&x[g / per_block], span);
                let group = panel * self.times.groups() + start + g;
                self.times.add(v, group, &dots, scales, &mut acc);
            }
        }
        if start + groups < self.times.groups() {
            for t in 0..T {
                out[t] = v.store(acc[t]);
            }
        } else {
            for t in 0..T {
                if token + t < self.sweep.m {
                    self.sweep.store(panel, token + t, &v.store(acc[t]).0);
                }
            }
        }
    }
}

/// A block of a tile, and which of its three sums.
struct TileScales<'a>(&'a ActTile, usize);

impl Scales for TileScales<'_> {
    #[inline(always)]
    fn scale(&self, t: usize) -> f32 {
        self.0.scale[t]
    }

    #[inline(always)]
    fn scaled_sum(&self, t: usize) -> f32 {
        self.0.scaled_sum[self.1][t]
    }
}
