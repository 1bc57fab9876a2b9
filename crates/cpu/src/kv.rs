//! The KV cache: blocks of positions, in every layer, for every key/value head.
//!
//! A block is cut into tiles of [`TILE`] positions. Attention meets a sequence tile by tile from
//! position 0 on, so where its blocks lie in the pool, and how large a block is, changes nothing.
//! In a tile, keys lie transposed — one line per element of the head, one lane per position — so
//! that sixteen scores come out of one register; values lie one position after another. Of int8
//! numbers a tile also has lines of scales, one for every [`GROUP`] elements, one lane per position.
//!
//! All of a block lies together: `[block][layer][head][tile]`, the keys of a tile before its values.
//! So blocks fill huge pages one after another, and what a step reads of a block in one layer is one
//! piece.

mod append;
mod line;
mod pages;
mod plan;

use std::ops::Range;

use spate_executor::BlockCopy;
use spate_types::BlockId;

use crate::CpuError;
use crate::linear::{Bf16x16, Column, F16x16, F32x16, I8x16, Lanes};
pub use line::KvDtype;
pub(crate) use line::{GROUP, KvLine, rotate};
use pages::ZeroPages;
pub(crate) use plan::KvPlan;

/// Positions in a tile: the lanes of a register.
pub(crate) const TILE: usize = 16;

/// Sizes of a pool, as each layer sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvShape {
    pub(crate) kv_heads: usize,
    /// A multiple of [`TILE`].
    pub(crate) head_dim: usize,
    pub(crate) blocks: usize,
    /// A multiple of [`TILE`].
    pub(crate) block_size: usize,
}

impl KvShape {
    /// Bytes of one block in one layer, keys and values.
    pub(crate) fn block_bytes(&self, dtype: KvDtype) -> u64 {
        let vector = dtype.vector_bytes(self.head_dim);
        2 * (self.kv_heads * self.block_size * vector) as u64
    }

    /// Lines of a tile, keys and values.
    fn lines(&self) -> usize {
        2 * self.head_dim
    }

    /// Lines of its scales, if it has any.
    fn scales(&self) -> usize {
        self.lines() / GROUP
    }

    /// Tiles of a block in one layer.
    fn block_tiles(&self) -> usize {
        self.kv_heads * self.block_size / TILE
    }
}

/// A sequence's blocks in one pool, from block `first` of the sequence on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pages<'a> {
    pub(crate) first: usize,
    pub(crate) blocks: &'a [BlockId],
}

/// The cache, with numbers of one kind.
pub(crate) enum KvCache {
    F32(KvPools<F32x16>),
    F16(KvPools<F16x16>),
    Bf16(KvPools<Bf16x16>),
    Int8(KvPools<I8x16>),
}

/// A cache of one kind of line.
pub(crate) struct KvPools<C> {
    /// The main pool and the local one.
    pools: [KvPool<C>; 2],
    /// For each layer, whether its blocks are of the local pool, and how many layers before it are
    /// of the same.
    layers: Vec<(bool, usize)>,
}

/// Blocks that have the same numbers in some layers.
struct KvPool<C> {
    shape: KvShape,
    layers: usize,
    lines: ZeroPages<C>,
    scales: ZeroPages<F16x16>,
}

/// Which tiles of a pool are those of one head in one layer.
#[derive(Debug, Clone, Copy)]
struct HeadTiles {
    shape: KvShape,
    /// The first of block 0.
    first: usize,
    /// Tiles from one block to the next.
    stride: usize,
}

/// The keys and values of one head in one layer.
#[derive(Clone, Copy)]
pub(crate) struct KvHead<'a, C> {
    tiles: HeadTiles,
    /// Of the whole pool.
    lines: &'a [C],
    scales: &'a [F16x16],
}

/// The keys or the values of sixteen positions.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a, C> {
    /// `[element][position]` of keys, `[position][element]` of values.
    pub(crate) lines: &'a [C],
    /// What they are multiplied with, `[group][position]`; empty if the numbers are not scaled.
    pub(crate) scales: &'a [F16x16],
    /// So many tiles further lie those that will be read soon, the nearer one first; 0 if there is
    /// none.
    ahead: [isize; 2],
}

#[inline(always)]
fn prefetch<T>(v: impl Lanes, half_tile: &[T], i: usize, ahead: [isize; 2]) {
    let tile = 2 * half_tile.len() as isize;
    let at = half_tile.as_ptr().wrapping_add(i);
    v.prefetch(at.wrapping_offset(ahead[1] * tile), false);
    v.prefetch(at.wrapping_offset(ahead[0] * tile), true);
}

impl<C: KvLine> Tile<'_, C> {
    /// Asks for the lines in the place of line `i` of tiles that will be read soon.
    #[inline(always)]
    pub(crate) fn prefetch(&self, v: impl Lanes, i: usize) {
        prefetch(v, self.lines, i, self.ahead);
    }

    /// The same for a line of scales.
    #[inline(always)]
    pub(crate) fn prefetch_scale(&self, v: impl Lanes, i: usize) {
        prefetch(v, self.scales, i, self.ahead);
    }

    /// What the numbers of a group of one position are multiplied with.
    #[inline(always)]
    pub(crate) fn scale(&self, group: usize, position: usize) -> f32 {
        match C::SCALED {
            true => self.scales[group].get(position),
            false => 1.0,
        }
    }
}

impl KvCache {
    /// Reserves all pools.
    pub(crate) fn new(plan: &KvPlan) -> Result<Self, CpuError> {
        let (shapes, local) = (plan.shapes(), &plan.is_local);
        Ok(match plan.dtype {
            KvDtype::F32 => KvCache::F32(KvPools::new(shapes, local)?),
            KvDtype::F16 => KvCache::F16(KvPools::new(shapes, local)?),
            KvDtype::Bf16 => KvCache::Bf16(KvPools::new(shapes, local)?),
            KvDtype::Int8 => KvCache::Int8(KvPools::new(shapes, local)?),
        })
    }

    /// Copies a block in every layer of the local pool, or of the main one.
    pub(crate) fn copy(&mut self, copy: BlockCopy, local: bool) {
        match self {
            KvCache::F32(pools) => pools.copy(copy, local),
            KvCache::F16(pools) => pools.copy(copy, local),
            KvCache::Bf16(pools) => pools.copy(copy, local),
            KvCache::Int8(pools) => pools.copy(copy, local),
        }
    }
}

impl<C: KvLine> KvPools<C> {
    /// Reserves all blocks of the main pool and the local one for layers that are local or not.
    /// Pages that no sequence has touched yet cost nothing.
    pub(crate) fn new([main, local]: [KvShape; 2], is_local: &[bool]) -> Result<Self, CpuError> {
        let mut counts = [0; 2];
        let layers = is_local.iter().map(|&local| {
            let count = &mut counts[usize::from(local)];
            *count += 1;
            (local, *count - 1)
        });
        let layers = layers.collect();
        Ok(Self {
            pools: [
                KvPool::new(main, counts[0])?,
                KvPool::new(local, counts[1])?,
            ],
            layers,
        })
    }

    /// Whether a layer's blocks are of the local pool.
    pub(crate) fn is_local(&self, layer: usize) -> bool {
        self.layers[layer].0
    }

    pub(crate) fn head(&self, layer: usize, head: usize) -> KvHead<'_, C> {
        let (local, layer) = self.layers[layer];
        let pool = &self.pools[usize::from(local)];
        KvHead {
            tiles: pool.head_tiles(layer, head),
            lines: &pool.lines,
            scales: &pool.scales,
        }
    }

    fn copy(&mut self, copy: BlockCopy, local: bool) {
        self.pools[usize::from(local)].copy(copy);
    }
}

impl<C: KvLine> KvPool<C> {
    fn new(shape: KvShape, layers: usize) -> Result<Self, CpuError> {
        let tiles = shape.blocks * layers * shape.block_tiles();
        let scales = if C::SCALED { shape.scales() } else { 0 };
        Ok(Self {
            shape,
            layers,
            lines: ZeroPages::new(tiles * shape.lines())?,
            scales: ZeroPages::new(tiles * scales)?,
        })
    }

    /// The tiles of a head in the `layer`-th of the pool's layers.
    fn head_tiles(&self, layer: usize, head: usize) -> HeadTiles {
        let shape = self.shape;
        HeadTiles {
            shape,
            first: (layer * shape.kv_heads + head) * (shape.block_size / TILE),
            stride: self.layers * shape.block_tiles(),
        }
    }

    fn copy(&mut self, block: BlockCopy) {
        fn copy<T: Copy>(data: &mut [T], len: usize, BlockCopy { src, dst }: BlockCopy) {
            let start = src.0 as usize * len;
            data.copy_within(start..start + len, dst.0 as usize * len);
        }
        let tiles = self.layers * self.shape.block_tiles();
        copy(&mut self.lines, tiles * self.shape.lines(), block);
        if C::SCALED {
            copy(&mut self.scales, tiles * self.shape.scales(), block);
        }
    }
}

impl HeadTiles {
    /// The tile that holds `position`.
    #[inline(always)]
    fn at(&self, pages: Pages<'_>, position: usize) -> usize {
        let size = self.shape.block_size;
        let block = pages.blocks[position / size - pages.first].0 as usize;
        block * self.stride + self.first + position % size / TILE
    }

    /// The lines of a tile.
    #[inline(always)]
    fn lines(&self, tile: usize) -> Range<usize> {
        let count = self.shape.lines();
        tile * count..(tile + 1) * count
    }

    /// Its lines of scales, if there are any.
    #[inline(always)]
    fn scales(&self, tile: usize) -> Range<usize> {
        let count = self.shape.scales();
        tile * count..(tile + 1) * count
    }
}

impl<'a, C: KvLine> KvHead<'a, C> {
    /// Elements of a key or a value.
    #[inline(always)]
    pub(crate) fn dim(&self) -> usize {
        self.tiles.shape.head_dim
    }

    /// Keys and values of the tile that holds `position`; those of the positions `soon` will be read
    /// soon, or none where that is `position` again.
    #[inline(always)]
    pub(crate) fn tile(
        &self,
        pages: Pages<'_>,
        position: usize,
        soon: [usize; 2],
    ) -> (Tile<'a, C>, Tile<'a, C>) {
        let tile = self.tiles.at(pages, position);
        let mut ahead = [0; 2];
        for i in 0..2 {
            if soon[i] != position {
                ahead[i] = self.tiles.at(pages, soon[i]) as isize - tile as isize;
            }
        }
        let dim = self.dim();
        let (keys, values) = self.lines[self.tiles.lines(tile)].split_at(dim);
        let (key_scales, value_scales) = match C::SCALED {
            true => self.scales[self.tiles.scales(tile)].split_at(dim / GROUP),
            false => Default::default(),
        };
        let keys = Tile {
            lines: keys,
            scales: key_scales,
            ahead,
        };
        let values = Tile {
            lines: values,
            scales: value_scales,
            ahead,
        };
        (keys, values)
    }
}
