//! The KV cache: blocks of positions, in every layer, for every key/value head.
//!
//! A block is cut into tiles of [`TILE`] positions. Attention meets a sequence tile by tile from
//! position 0 on, so where its blocks lie in the pool, and how large a block is, changes nothing.
//! In a tile, keys lie transposed — one line per element of the head, one lane per position — so
//! that sixteen scores come out of one register; values lie one position after another. Of int8
//! numbers a tile also has lines of scales, one for every [`GROUP`] elements, one lane per position.

mod line;
mod pages;
mod plan;

use spate_executor::BlockCopy;
use spate_types::BlockId;

use crate::CpuError;
use crate::linear::{Bf16x16, Column, F16x16, F32x16, I8x16};
pub use line::KvDtype;
use line::int8_scale;
pub(crate) use line::{GROUP, KvLine, rotate};
use pages::ZeroPages;
pub(crate) use plan::KvPlan;

/// Positions in a tile: the lanes of a register.
pub(crate) const TILE: usize = 16;

/// Sizes of one layer's cache.
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
    /// Bytes of one block, keys and values.
    pub(crate) fn block_bytes(&self, dtype: KvDtype) -> u64 {
        let vector = dtype.vector_bytes(self.head_dim);
        2 * (self.kv_heads * self.block_size * vector) as u64
    }

    /// Lines of a tile's keys, or of its values.
    fn tile_lines(&self) -> usize {
        self.head_dim
    }

    /// Groups of elements with the same scale in a key or a value.
    fn groups(&self) -> usize {
        self.head_dim / GROUP
    }

    /// Tiles of a block.
    fn block_tiles(&self) -> usize {
        self.block_size / TILE
    }

    /// The tile that holds `position`.
    fn tile(&self, pages: Pages<'_>, position: usize) -> usize {
        let block = pages.blocks[position / self.block_size - pages.first].0 as usize;
        block * self.block_tiles() + position % self.block_size / TILE
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
    F32(KvPool<F32x16>),
    F16(KvPool<F16x16>),
    Bf16(KvPool<Bf16x16>),
    Int8(KvPool<I8x16>),
}

/// A cache of one kind of line.
pub(crate) struct KvPool<C> {
    layers: Vec<KvLayer<C>>,
}

/// All blocks of one layer.
pub(crate) struct KvLayer<C> {
    pub(crate) shape: KvShape,
    /// Whether its blocks are of the local pool.
    pub(crate) local: bool,
    pub(crate) heads: Vec<HeadPool<C>>,
}

/// All blocks of one head in one layer.
pub(crate) struct HeadPool<C> {
    keys: Vectors<C>,
    values: Vectors<C>,
}

/// The keys, or the values.
struct Vectors<C> {
    lines: ZeroPages<C>,
    /// One line per group of a tile if the numbers are scaled, otherwise none.
    scales: ZeroPages<F16x16>,
}

/// The keys or the values of sixteen positions.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a, C> {
    /// `[element][position]` of keys, `[position][element]` of values.
    pub(crate) lines: &'a [C],
    /// What they are multiplied with, `[group][position]`; empty if the numbers are not scaled.
    pub(crate) scales: &'a [F16x16],
}

impl<C: KvLine> Tile<'_, C> {
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
        let layers = plan.layers();
        Ok(match plan.dtype {
            KvDtype::F32 => KvCache::F32(KvPool::new(layers)?),
            KvDtype::F16 => KvCache::F16(KvPool::new(layers)?),
            KvDtype::Bf16 => KvCache::Bf16(KvPool::new(layers)?),
            KvDtype::Int8 => KvCache::Int8(KvPool::new(layers)?),
        })
    }

    /// Copies a block in every layer of the local pool, or of the main one.
    pub(crate) fn copy(&mut self, copy: BlockCopy, local: bool) {
        match self {
            KvCache::F32(pool) => pool.copy(copy, local),
            KvCache::F16(pool) => pool.copy(copy, local),
            KvCache::Bf16(pool) => pool.copy(copy, local),
            KvCache::Int8(pool) => pool.copy(copy, local),
        }
    }
}

impl<C: KvLine> KvPool<C> {
    /// Reserves all blocks of layers with these shapes, in the local pool or not. Pages that no
    /// sequence has touched yet cost nothing.
    pub(crate) fn new(layers: impl Iterator<Item = (KvShape, bool)>) -> Result<Self, CpuError> {
        let layers = layers.map(|(shape, local)| {
            let head = |_| {
                Ok(HeadPool {
                    keys: Vectors::new(&shape)?,
                    values: Vectors::new(&shape)?,
                })
            };
            let heads = (0..shape.kv_heads).map(head);
            Ok(KvLayer {
                shape,
                local,
                heads: heads.collect::<Result<_, CpuError>>()?,
            })
        });
        let layers = layers.collect::<Result<_, CpuError>>()?;
        Ok(Self { layers })
    }

    pub(crate) fn layer(&self, layer: usize) -> &KvLayer<C> {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut KvLayer<C> {
        &mut self.layers[layer]
    }

    fn copy(&mut self, copy: BlockCopy, local: bool) {
        for layer in self.layers.iter_mut().filter(|l| l.local == local) {
            for head in &mut layer.heads {
                head.keys.copy(&layer.shape, copy);
                head.values.copy(&layer.shape, copy);
            }
        }
    }
}

impl<C: KvLine> HeadPool<C> {
    /// Stores the key and the value of one position, `head_dim` numbers each.
    pub(crate) fn append(
        &mut self,
        shape: &KvShape,
        pages: Pages<'_>,
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let (tile, lane) = (shape.tile(pages, position), position % TILE);
        let groups = shape.groups();
        for (g, key) in key.as_chunks::<GROUP>().0.iter().enumerate() {
            let mut key = *key;
            if C::SCALED {
                rotate(&mut key);
            }
            let line = self.keys.line(tile * groups + g, lane, key);
            let lines = &mut self.keys.lines[tile * shape.tile_lines() + g * GROUP..][..GROUP];
            for (element, own) in lines.iter_mut().enumerate() {
                own.set_from(lane, &line, element);
            }
        }
        for (g, value) in value.as_chunks::<GROUP>().0.iter().enumerate() {
            let line = self.values.line(tile * groups + g, lane, *value);
            self.values.lines[tile * shape.tile_lines() + lane * groups + g] = line;
        }
    }

    /// Keys and values of the tile that holds `position`.
    #[inline(always)]
    pub(crate) fn tile(
        &self,
        shape: &KvShape,
        pages: Pages<'_>,
        position: usize,
    ) -> (Tile<'_, C>, Tile<'_, C>) {
        let tile = shape.tile(pages, position);
        (self.keys.tile(shape, tile), self.values.tile(shape, tile))
    }
}

impl<C: KvLine> Vectors<C> {
    fn new(shape: &KvShape) -> Result<Self, CpuError> {
        let tiles = shape.blocks * shape.block_tiles();
        Ok(Self {
            lines: ZeroPages::new(tiles * shape.tile_lines())?,
            scales: ZeroPages::new(if C::SCALED { tiles * shape.groups() } else { 0 })?,
        })
    }

    /// One group's numbers `x` as a line; its scale, if there is one, is stored.
    fn line(&mut self, group: usize, lane: usize, mut x: [f32; GROUP]) -> C {
        if C::SCALED {
            let (scale, inverse) = int8_scale(&x);
            self.scales[group].set(lane, scale);
            x.iter_mut().for_each(|x| *x *= inverse);
        }
        C::from_floats(&x)
    }

    #[inline(always)]
    fn tile(&self, shape: &KvShape, tile: usize) -> Tile<'_, C> {
        let (lines, groups) = (shape.tile_lines(), shape.groups());
        Tile {
            lines: &self.lines[tile * lines..][..lines],
            scales: match C::SCALED {
                true => &self.scales[tile * groups..][..groups],
                false => &[],
            },
        }
    }

    fn copy(&mut self, shape: &KvShape, block: BlockCopy) {
        fn copy<T: Copy>(data: &mut [T], len: usize, BlockCopy { src, dst }: BlockCopy) {
            let start = src.0 as usize * len;
            data.copy_within(start..start + len, dst.0 as usize * len);
        }
        let tiles = shape.block_tiles();
        copy(&mut self.lines, tiles * shape.tile_lines(), block);
        if C::SCALED {
            copy(&mut self.scales, tiles * shape.groups(), block);
        }
    }
}
