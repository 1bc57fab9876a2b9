//! Quantised weights, rearranged so that sixteen output rows fill the lanes of a register.

use std::iter;

use half::f16;
use spate_model::quant::{GgmlType, Scheme, Unpacked, unpack};

use super::activations::{ActBlock, BLOCK, Quantized};
use super::isa::Isa;
use super::lanes::{Half16, Lanes, Line};
use super::memory::huge_vec;
use super::sweep::{PANEL, Panels, Sweep, panels};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::tile_sweep::TileSweep;
use crate::pool::ThreadPool;

/// How many lines ahead weights are asked for, into the second-level cache and into the first. With
/// several tokens so much is computed on each line that the CPU by itself does not look ahead far
/// enough: weights from memory met 8 tokens at half the speed of weights from the cache.
const FAR: usize = 64;
const NEAR: usize = 16;

/// How the weights of a matrix are stored: `scale · (q - offset)`, or `scale · q + min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    /// 4, 5, 6 or 8. The offset is half the range.
    bits: u32,
    /// Columns that share a scale: 16 or 32.
    group: usize,
    /// A minimum instead of the offset.
    has_min: bool,
}

/// A matrix in panels of sixteen rows. Row `r` of a panel lives in lane `r`; missing rows of the
/// last panel are zero.
///
/// A group of `group` columns of a panel takes `bits · group / 32` lines. Byte `4 r + j` of line `i`
/// belongs to row `r` and column `4 i + j`; with less than 8 bits that is the low nibble, and the high
/// nibble belongs to the column half a group further. The fifth and sixth bits have one more line:
/// `bits - 4` bits of byte `4 r + j` for each of the columns `j`, `4 + j`, `8 + j` …, from the lowest
/// bits on. Scales and minima are float16: exact for the formats
/// whose files hold float16; for the "K" formats the products of block scale and group scale are
/// rounded to 11 bits, far below the error of the weights themselves.
pub(super) struct Packed {
    format: Format,
    groups: usize,
    lines: Vec<Line>,
    scales: Vec<Half16>,
    mins: Vec<Half16>,
}

impl Format {
    fn new(scheme: Scheme) -> Self {
        let bits = match (scheme.bits, scheme.group) {
            (..=4, _) => 4,
            (5, 32) => 5,
            (6, 16) => 6,
            _ => 8,
        };
        Self {
            bits,
            group: scheme.group,
            has_min: scheme.has_min,
        }
    }

    const fn lines_per_group(self) -> usize {
        self.bits as usize * self.group / 32
    }

    /// Lines of nibbles; 0 if the weights are bytes.
    const fn nibble_lines(self) -> usize {
        if self.bits == 8 { 0 } else { self.group / 8 }
    }

    const fn offset(self) -> u8 {
        if self.has_min {
            0
        } else {
            1 << (self.bits - 1)
        }
    }

    /// What the bits above a nibble are in a byte.
    const fn high_mask(self) -> u8 {
        ((1 << self.bits) - 1) as u8 & 0xf0
    }

    /// How far to rotate a byte of the line of high bits to the left to bring those of the columns
    /// `4 quad ..` above a nibble.
    const fn turn(self, quad: usize) -> u32 {
        (4 + 8 - (self.bits - 4) * quad as u32) % 8
    }
}

impl Packed {
    /// `bytes` are `rows · cols` weights of the quantised type `ty`, `cols` in whole blocks.
    pub(super) fn new(
        ty: GgmlType,
        scheme: Scheme,
        (rows, cols): (usize, usize),
        bytes: &[u8],
        pool: &ThreadPool,
    ) -> Self {
        let format = Format::new(scheme);
        let groups = cols / format.group;
        let total = panels(rows) * groups;
        let zero = Half16([0; PANEL]);
        let mut packed = Self {
            format,
            groups,
            lines: huge_vec(Line([0; 64]), total * format.lines_per_group()),
            scales: huge_vec(zero, total),
            mins: huge_vec(zero, if format.has_min { total } else { 0 }),
        };
        let mins = packed
            .mins
            .chunks_mut(groups)
            .chain(iter::repeat_with(Default::default));
        let mut parts: Vec<PanelMut<'_>> = packed
            .lines
            .chunks_mut(groups * format.lines_per_group())
            .zip(packed.scales.chunks_mut(groups))
            .zip(mins)
            .map(|((lines, scales), mins)| PanelMut {
                lines,
                scales,
                mins,
            })
            .collect();
        let row_bytes = bytes.len() / rows;
        pool.run_chunks(&mut parts, 1, |panel, part| {
            let rows = bytes
                .chunks_exact(row_bytes)
                .skip(panel * PANEL)
                .take(PANEL);
            for (lane, row) in rows.enumerate() {
                part[0].pack_row(format, (ty, scheme), lane, row);
            }
        });
        packed
    }

    /// Bytes of a matrix of quantised weights, before it is made.
    pub(super) fn bytes_for(scheme: Scheme, (rows, cols): (usize, usize)) -> usize {
        let format = Format::new(scheme);
        let floats = if format.has_min { 2 } else { 1 };
        let group = format.lines_per_group() * size_of::<Line>() + floats * size_of::<Half16>();
        panels(rows) * (cols / format.group) * group
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.lines) + size_of_val(&*self.scales) + size_of_val(&*self.mins)
    }

    /// The products of `sweep`'s panels with the activations `x`.
    pub(super) fn times(&self, isa: Isa, x: Quantized<'_>, sweep: Sweep<'_>) {
        let Format {
            bits,
            group,
            has_min,
        } = self.format;
        match (bits, group, has_min) {
            (4, 32, false) => self.run::<4, 32, false>(isa, x, sweep),
            (4, 32, true) => self.run::<4, 32, true>(isa, x, sweep),
            (4, 16, false) => self.run::<4, 16, false>(isa, x, sweep),
            (4, 16, true) => self.run::<4, 16, true>(isa, x, sweep),
            (5, 32, false) => self.run::<5, 32, false>(isa, x, sweep),
            (5, 32, true) => self.run::<5, 32, true>(isa, x, sweep),
            (6, 16, false) => self.run::<6, 16, false>(isa, x, sweep),
            (8, 32, false) => self.run::<8, 32, false>(isa, x, sweep),
            other => unreachable!("no GGML type has the format {other:?}"),
        }
    }

    fn run<const BITS: u32, const GROUP: usize, const MIN: bool>(
        &self,
        isa: Isa,
        x: Quantized<'_>,
        sweep: Sweep<'_>,
    ) {
        let weights = self;
        match x {
            Quantized::Blocks(x) => {
                sweep.run(isa, PackedTimes::<BITS, GROUP, MIN> { weights, x });
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Quantized::Tiles(x) => {
                let times = PackedTimes::<BITS, GROUP, MIN> { weights, x: &[] };
                isa.run_tiles(TileSweep { sweep, times, x });
            }
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            Quantized::Tiles(_) => unreachable!("without a matrix unit there are no tiles"),
        }
    }

    /// One row as float32.
    pub(super) fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let per_group = self.format.lines_per_group();
        let offset = f32::from(self.format.offset());
        for (g, out) in out.chunks_exact_mut(self.format.group).enumerate() {
            let at = panel * self.groups + g;
            let scale = f16::from_bits(self.scales[at].0[lane]).to_f32();
            let min = match self.format.has_min {
                true => f16::from_bits(self.mins[at].0[lane]).to_f32(),
                false => 0.0,
            };
            let lines = &self.lines[at * per_group..][..per_group];
            for (c, out) in out.iter_mut().enumerate() {
                let (quad, at) = (c / 4, 4 * lane + c % 4);
                let q = match self.format.nibble_lines() {
                    0 => lines[quad].0[at],
                    count => {
                        let nibbles = lines[quad % count].0[at];
                        let low = if quad < count {
                            nibbles & 0x0f
                        } else {
                            nibbles >> 4
                        };
                        let high = lines[per_group - 1].0[at].rotate_left(self.format.turn(quad));
                        low | (high & self.format.high_mask())
                    }
                };
                *out = scale * (f32::from(q) - offset) + min;
            }
        }
    }
}

/// A panel while it is filled.
struct PanelMut<'a> {
    lines: &'a mut [Line],
    scales: &'a mut [Half16],
    mins: &'a mut [Half16],
}

impl PanelMut<'_> {
    fn pack_row(
        &mut self,
        format: Format,
        (ty, scheme): (GgmlType, Scheme),
        lane: usize,
        row: &[u8],
    ) {
        let shift = format.offset() - scheme.offset;
        let block_groups = ty.block_elems() / scheme.group;
        let per_group = format.lines_per_group();
        let mut unpacked = Unpacked::default();
        for (b, block) in row.chunks_exact(ty.block_bytes()).enumerate() {
            unpack(ty, block, &mut unpacked);
            for g in 0..block_groups {
                let at = b * block_groups + g;
                self.scales[at].0[lane] = f16::from_f32(unpacked.scale[g]).to_bits();
                if let Some(min) = self.mins.get_mut(at) {
                    min.0[lane] = f16::from_f32(unpacked.min[g]).to_bits();
                }
                let q = &unpacked.q[g * scheme.group..][..scheme.group];
                let lines = &mut self.lines[at * per_group..][..per_group];
                pack_group(format, q, shift, lane, lines);
            }
        }
    }
}

fn pack_group(format: Format, q: &[u8], shift: u8, lane: usize, lines: &mut [Line]) {
    let per_group = lines.len();
    for (c, q) in q.iter().enumerate() {
        let (q, quad, at) = (q + shift, c / 4, 4 * lane + c % 4);
        match format.nibble_lines() {
            0 => lines[quad].0[at] = q,
            count => {
                let nibble = if quad < count { q & 0x0f } else { q << 4 };
                lines[quad % count].0[at] |= nibble;
                let high = (q & format.high_mask()).rotate_right(format.turn(quad));
                lines[per_group - 1].0[at] |= high;
            }
        }
    }
}

/// The panels of a matrix with the activations that they meet; `BITS`, `GROUP` and `MIN` are those
/// of the format.
///
/// Each result is `Σ_g scale_w · scale_x · (Σ_c q_w · q_x)`, plus `min · scale_x · Σ_c q_x`, added
/// up group by group from the first column on, whatever the number of tokens: the inner sums are
/// exact integers.
pub(super) struct PackedTimes<'a, const BITS: u32, const GROUP: usize, const MIN: bool> {
    weights: &'a Packed,
    /// `[m, cols / 32]`
    x: &'a [ActBlock],
}

impl<const BITS: u32, const GROUP: usize, const MIN: bool> PackedTimes<'_, BITS, GROUP, MIN> {
    const FORMAT: Format = Format {
        bits: BITS,
        group: GROUP,
        has_min: MIN,
    };

    /// Groups of a panel: those of panel `p` begin with group `p * groups()`.
    #[inline(always)]
    pub(super) fn groups(&self) -> usize {
        self.weights.groups
    }

    #[inline(always)]
    fn lines(&self, group: usize) -> &[Line] {
        let count = Self::FORMAT.lines_per_group();
        &self.weights.lines[group * count..][..count]
    }

    /// Asks for a group, which need not exist.
    #[inline(always)]
    fn prefetch(&self, v: impl Lanes, group: usize, near: bool) {
        let count = Self::FORMAT.lines_per_group();
        let lines = self.weights.lines.as_ptr().wrapping_add(group * count);
        for i in 0..count {
            v.prefetch(lines.wrapping_add(i), near);
        }
        v.prefetch(self.weights.scales.as_ptr().wrapping_add(group), near);
        if MIN {
            v.prefetch(self.weights.mins.as_ptr().wrapping_add(group), near);
        }
    }

    /// The weights of the columns `4 i + j` of a group, and of those half a group further.
    #[inline(always)]
    fn halves<V: Lanes>(v: V, lines: &[Line], i: usize) -> (V::Q, V::Q) {
        let (format, count) = (Self::FORMAT, Self::FORMAT.nibble_lines());
        let (mut low, mut high) = v.nibbles(&lines[i]);
        if BITS > 4 {
            let above = v.bytes(&lines[count]);
            low = v.with_high(low, above, format.turn(i), format.high_mask());
            high = v.with_high(high, above, format.turn(i + count), format.high_mask());
        }
        (low, high)
    }

    /// A group's weights less their offset, as signed bytes: `GROUP / 4` lines of four columns.
    #[inline(always)]
    pub(super) fn unpack<V: Lanes>(&self, v: V, group: usize, out: &mut [Line]) {
        let (lines, offset) = (self.lines(group), Self::FORMAT.offset());
        if BITS == 8 {
            for (out, line) in out.iter_mut().zip(lines) {
                *out = v.store_bytes(v.bytes(line), offset);
            }
        } else {
            let count = Self::FORMAT.nibble_lines();
            for i in 0..count {
                let (low, high) = Self::halves(v, lines, i);
                out[i] = v.store_bytes(low, offset);
                out[i + count] = v.store_bytes(high, offset);
            }
        }
    }

    /// `Σ_c (q_w - offset) · q_x` over a group's columns, which are the `part`-th of block `b`.
    #[inline(always)]
    fn dots<V: Lanes, const T: usize>(
        &self,
        v: V,
        group: usize,
        x: &[&[ActBlock]; T],
        (b, part): (usize, usize),
    ) -> [V::I; T] {
        let (lines, word) = (self.lines(group), part * (GROUP / 4));
        let mut dots = [v.splat_i(0); T];
        if !MIN {
            let offset = i32::from(Self::FORMAT.offset());
            for t in 0..T {
                dots[t] = v.splat_i(-offset * x[t][b].sum[Self::span(part)]);
            }
        }
        if BITS == 8 {
            for (i, line) in lines.iter().enumerate() {
                let q = v.bytes(line);
                for t in 0..T {
                    dots[t] = v.dot4::<true>(dots[t], q, x[t][b].words[word + i]);
                }
            }
        } else {
            let count = Self::FORMAT.nibble_lines();
            for i in 0..count {
                let (low, high) = Self::halves(v, lines, i);
                for t in 0..T {
                    let words = &x[t][b].words[word..];
                    dots[t] = v.dot4::<false>(dots[t], low, words[i]);
                    dots[t] = v.dot4::<false>(dots[t], high, words[i + count]);
                }
            }
        }
        dots
    }

    /// Adds a group, whose [`dots`](Self::dots) are given, to the outputs.
    #[inline(always)]
    pub(super) fn add<V: Lanes, const T: usize>(
        &self,
        v: V,
        group: usize,
        dots: &[V::I; T],
        x: impl Scales,
        out: &mut [V::F; T],
    ) {
        let scale = v.load_f16(&self.weights.scales[group]);
        for t in 0..T {
            let scale = v.mul(scale, v.splat(x.scale(t)));
            out[t] = v.mul_add(v.to_f(dots[t]), scale, out[t]);
        }
        if MIN {
            let min = v.load_f16(&self.weights.mins[group]);
            for t in 0..T {
                out[t] = v.mul_add(min, v.splat(x.scaled_sum(t)), out[t]);
            }
        }
    }

    /// Which of a block's three sums goes with its `part`-th group.
    #[inline(always)]
    pub(super) const fn span(part: usize) -> usize {
        if GROUP == BLOCK { 2 } else { part }
    }
}

impl<const BITS: u32, const GROUP: usize, const MIN: bool> Panels
    for PackedTimes<'_, BITS, GROUP, MIN>
{
    #[inline(always)]
    fn tile<V: Lanes, const T: usize>(&self, v: V, panel: usize, token: usize) -> [V::F; T] {
        let (groups, per_block) = (self.groups(), BLOCK / GROUP);
        let blocks = groups / per_block;
        let mut x: [&[ActBlock]; T] = [&[]; T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = &self.x[(token + t) * blocks..][..blocks];
        }
        let mut out = [v.splat(0.0); T];
        for g in 0..groups {
            let (first, per_group) = (panel * groups + g, Self::FORMAT.lines_per_group());
            self.prefetch(v, first + FAR / per_group, false);
            if T > 1 {
                self.prefetch(v, first + NEAR / per_group, true);
            }
            let (group, at) = (panel * groups + g, (g / per_block, g % per_block));
            let dots = self.dots(v, group, &x, at);
            let scales = BlockScales(&x, at.0, Self::span(at.1));
            self.add(v, group, &dots, scales, &mut out);
        }
        out
    }
}

/// The numbers of a group's activations, of some tokens, that products are multiplied with.
pub(super) trait Scales {
    fn scale(&self, t: usize) -> f32;
    /// Of the group's own columns.
    fn scaled_sum(&self, t: usize) -> f32;
}

/// The tokens' blocks, which of them, and which of its three sums.
struct BlockScales<'a, const T: usize>(&'a [&'a [ActBlock]; T], usize, usize);

impl<const T: usize> Scales for BlockScales<'_, T> {
    #[inline(always)]
    fn scale(&self, t: usize) -> f32 {
        self.0[t][self.1].scale
    }

    #[inline(always)]
    fn scaled_sum(&self, t: usize) -> f32 {
        self.0[t][self.1].scaled_sum[self.2]
    }
}
