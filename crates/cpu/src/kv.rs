//! The KV cache: blocks of positions, in every layer, for every key/value head.
//!
//! A block is cut into tiles of [`TILE`] positions. Attention meets a sequence tile by tile from
//! position 0 on, so where its blocks lie in the pool, and how large a block is, changes nothing.
//! In a tile, keys lie transposed — one line per element of the head, one lane per position — so
//! that sixteen scores come out of one register; values lie one position after another.

use std::alloc::{Layout, alloc_zeroed};

use spate_executor::BlockCopy;
use spate_types::BlockId;

use crate::CpuError;
use crate::linear::{Column, F16x16, F32x16};

/// Positions in a tile: the lanes of a register.
pub(crate) const TILE: usize = 16;

/// Sizes of the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    /// A multiple of [`TILE`].
    pub(crate) head_dim: usize,
    pub(crate) blocks: usize,
    /// A multiple of [`TILE`].
    pub(crate) block_size: usize,
}

impl KvShape {
    /// Bytes of one block, keys and values of all layers, at `elem` bytes per number.
    pub(crate) fn block_bytes(&self, elem: usize) -> u64 {
        2 * (self.layers * self.kv_heads * self.head_dim * self.block_size * elem) as u64
    }

    /// Lines of a tile's keys, or of its values.
    fn tile_lines(&self) -> usize {
        self.head_dim
    }

    /// Lines of a block's keys (or values) of one head in one layer.
    fn block_lines(&self) -> usize {
        self.block_size / TILE * self.tile_lines()
    }

    /// First line of the tile that holds `position`.
    fn tile_start(&self, blocks: &[BlockId], position: usize) -> usize {
        let block = blocks[position / self.block_size].0 as usize;
        let tile = position % self.block_size / TILE;
        block * self.block_lines() + tile * self.tile_lines()
    }
}

/// The cache, with numbers of the width that the mode asks for.
pub(crate) enum KvCache {
    F32(KvPool<F32x16>),
    F16(KvPool<F16x16>),
}

/// A cache of one kind of line.
pub(crate) struct KvPool<C> {
    pub(crate) shape: KvShape,
    /// `[layers][kv_heads]`
    layers: Vec<Vec<HeadPool<C>>>,
}

/// All blocks of one head in one layer.
pub(crate) struct HeadPool<C> {
    keys: Box<[C]>,
    values: Box<[C]>,
}

impl KvCache {
    pub(crate) fn copy(&mut self, copy: BlockCopy) {
        match self {
            KvCache::F32(pool) => pool.copy(copy),
            KvCache::F16(pool) => pool.copy(copy),
        }
    }
}

impl<C: Column> KvPool<C> {
    /// Reserves the whole pool. Pages that no sequence has touched yet cost nothing.
    pub(crate) fn new(shape: KvShape) -> Result<Self, CpuError> {
        let lines = shape.blocks * shape.block_lines();
        let head = || {
            Ok(HeadPool {
                keys: zeroed(lines)?,
                values: zeroed(lines)?,
            })
        };
        let layer = || (0..shape.kv_heads).map(|_| head()).collect();
        let layers = (0..shape.layers).map(|_| layer());
        Ok(Self {
            shape,
            layers: layers.collect::<Result<_, CpuError>>()?,
        })
    }

    pub(crate) fn layer(&self, layer: usize) -> &[HeadPool<C>] {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut [HeadPool<C>] {
        &mut self.layers[layer]
    }

    fn copy(&mut self, copy: BlockCopy) {
        let len = self.shape.block_lines();
        let (src, dst) = (copy.src.0 as usize * len, copy.dst.0 as usize * len);
        for head in self.layers.iter_mut().flatten() {
            head.keys.copy_within(src..src + len, dst);
            head.values.copy_within(src..src + len, dst);
        }
    }
}

impl<C: Column> HeadPool<C> {
    /// Stores the key and the value of one position, `head_dim` numbers each.
    pub(crate) fn append(
        &mut self,
        shape: &KvShape,
        blocks: &[BlockId],
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let tile = shape.tile_start(blocks, position);
        let lane = position % TILE;
        let keys = &mut self.keys[tile..tile + key.len()];
        for (line, &k) in keys.iter_mut().zip(key) {
            line.set(lane, k);
        }
        let lines = value.len() / TILE;
        let values = &mut self.values[tile + lane * lines..][..lines];
        for (line, v) in values.iter_mut().zip(value.chunks_exact(TILE)) {
            v.iter().enumerate().for_each(|(l, &v)| line.set(l, v));
        }
    }

    /// The tile that holds `position`: `head_dim` lines of keys (`[element][position]`), as many of
    /// values (`[position][element]`).
    #[inline(always)]
    pub(crate) fn tile(
        &self,
        shape: &KvShape,
        blocks: &[BlockId],
        position: usize,
    ) -> (&[C], &[C]) {
        let start = shape.tile_start(blocks, position);
        let range = start..start + shape.tile_lines();
        (&self.keys[range.clone()], &self.values[range])
    }
}

/// `len` lines of zeros straight from the system, untouched. (A `vec![ZERO; len]` would write, and
/// so make resident, every page, and abort the process where there is no room.)
fn zeroed<C: Column>(len: usize) -> Result<Box<[C]>, CpuError> {
    let bytes = len.saturating_mul(size_of::<C>());
    let error = CpuError::OutOfMemory {
        what: "the KV cache",
        bytes,
    };
    let Ok(layout) = Layout::array::<C>(len) else {
        return Err(error);
    };
    if layout.size() == 0 {
        return Ok(Box::new([]));
    }
    // SAFETY: the layout is not empty.
    let data = unsafe { alloc_zeroed(layout) }.cast::<C>();
    if data.is_null() {
        return Err(error);
    }
    // SAFETY: `data` was allocated by the global allocator with the layout of `[C; len]`; lines are
    // plain numbers, for which all bits zero is a value.
    Ok(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(data, len)) })
}
