use std::cmp::Reverse;
use std::ffi::c_void;

use half::bf16;
use spate_types::BlockId;

use super::{KvShape, image};
use crate::CudaError;
use crate::driver::{
    Arena, Device, Kernel, Module, Parameter, Plain, Shape, Slice, Stream, TensorMap,
};

/// What a step computes of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Its first token in the step.
    pub token: u32,
    /// How many tokens.
    pub tokens: u32,
    /// Position of the first.
    pub position: u32,
    /// Where its block table begins in the step's tables.
    pub table: u32,
}

/// A unit of work, for each key/value head: a tile of query rows, or a split of positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Work {
    token: u32,
    tokens: u32,
    position: u32,
    table: u32,
    part: u32,
}

// SAFETY: numbers, laid out as in attention.cuh.
unsafe impl Plain for Work {}

/// A sequence that computes one new token, in the work of one of its splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Sharer {
    token: u32,
    position: u32,
    slot: u32,
}

// SAFETY: numbers, laid out as in attention.cuh.
unsafe impl Plain for Sharer {}

impl Sequence {
    fn work(&self, part: u32) -> Work {
        let Self {
            token,
            tokens,
            position,
            table,
        } = *self;
        Work {
            token,
            tokens,
            position,
            table,
            part,
        }
    }
}

/// Which kernels to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Those that run on every GPU.
    Portable,
    /// Those for compute capability 9.0 (Hopper).
    Hopper,
}

impl Path {
    /// The best for a device.
    pub fn best(device: &Device) -> Self {
        match device.capability() {
            (9, 0) => Self::Hopper,
            _ => Self::Portable,
        }
    }
}

/// What a model fixes of its attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionModel {
    /// Query heads.
    pub heads: u32,
    /// The cache.
    pub shape: KvShape,
    /// Factor of the scores.
    pub scale: f32,
    /// Scores are kept below it: `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
}

/// What a step looks like, on the GPU.
#[derive(Clone, Copy)]
pub struct AttentionStep {
    /// Block ids of its sequences.
    pub tables: Slice<u32>,
    /// From [`Attention::prefill_work`] or [`Attention::decode_work`], for the same window.
    pub work: Slice<Work>,
    /// How many of `work` there are, and [how many blocks](Attention::prefill_blocks) may do it: not
    /// arguments, so that a captured graph can vary them.
    pub works: Slice<u32>,
    /// Of decoding.
    pub sharers: Slice<Sharer>,
    /// Of decoding: it may run beside the attention of prompts that was queued just before.
    pub beside: bool,
    /// A query sees that many positions up to its own; all of them if `None`.
    pub window: Option<u32>,
}

/// What [`Attention::decode_work`] lists.
#[derive(Debug, Clone, Default)]
pub struct DecodeWork {
    /// The work.
    pub work: Vec<Work>,
    /// Who shares it: of each work some neighbours, which are at least one.
    pub sharers: Vec<Sharer>,
    /// Partial results: as many as `sharers`.
    slots: u32,
}

impl DecodeWork {
    fn clear(&mut self) {
        self.work.clear();
        self.sharers.clear();
        self.slots = 0;
    }

    fn push(&mut self, sharers: &[Sharer], position: u32, table: u32, part: u32) {
        self.work.push(Work {
            token: self.sharers.len() as u32,
            tokens: sharers.len() as u32,
            position,
            table,
            part,
        });
        self.sharers.extend(sharers);
    }
}

/// Room for the partial results of a decode step.
#[derive(Clone, Copy)]
pub struct DecodeScratch {
    out: Slice<f32>,
    sums: Slice<f32>,
    counters: Slice<u32>,
    works: usize,
}

impl DecodeScratch {
    /// Sets the counters to zero, as they must be before the first step.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// The memory is alive until that has run.
    pub unsafe fn reset(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: the caller vouches for the memory.
        unsafe { stream.fill(self.counters, 0) }
    }
}

/// Paged causal attention; see `kernels/attention_sm90a.cu`, `attention_prefill.cu` and
/// `attention_decode.cu`.
pub struct Attention {
    model: AttentionModel,
    cache: Slice<u8>,
    /// Of bfloat16 only.
    prefill: Option<Kernel>,
    decode: Kernel,
    hopper: Option<Hopper>,
    sms: u32,
}

/// How the Hopper kernels read the cache.
struct Hopper {
    /// Of bfloat16 only.
    map: TensorMap,
    box_rows: u32,
}

/// As in attention.cuh; `Slice`s as plain addresses.
#[derive(Clone, Copy)]
#[repr(C)]
struct Arguments {
    q: u64,
    out: u64,
    cache: u64,
    tables: u64,
    work: u64,
    works: u64,
    sharers: u64,
    partial_out: u64,
    partial_sum: u64,
    counters: u64,
    shape: KvShape,
    layer: u32,
    q_stride: u32,
    group: u32,
    window: u32,
    scale: f32,
    cap_in: f32,
    cap_out: f32,
    beside: u32,
}

// SAFETY: laid out as AttentionArgs of attention.cuh.
unsafe impl Parameter for Arguments {
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

/// Sizes that the kernels fix per head size: positions of a tile, tiles of 64 query rows in a block.
struct HopperSizes {
    tile: u32,
    consumers: u32,
}

/// Says that work is for as many blocks as there are.
pub const ALL_BLOCKS: u32 = u32::MAX;

const HOPPER_SPLIT: u32 = 1024;
/// Query rows of a tile when decoding.
const HOPPER_DECODE_ROWS: u32 = 64;
const PORTABLE_SPLIT: u32 = 256;
/// Stages of keys and of values.
const HOPPER_STAGES: u32 = 2;
const PORTABLE_STAGES: u32 = 3;
/// Most tiles of codes that a block of the Hopper kernel holds, and its shared memory.
const HOPPER_SLOTS: u32 = 8;
const HOPPER_SHARED: u32 = 226 << 10;

impl HopperSizes {
    fn new(head_dim: u32) -> Self {
        match head_dim {
            256 => Self {
                tile: 64,
                consumers: 1,
            },
            _ => Self {
                tile: 128,
                consumers: 2,
            },
        }
    }

    /// As `Shape::SHARED_BYTES` of attention_sm90a.cuh.
    fn shared_bytes(&self, head_dim: u32, decode: bool, packed: bool) -> u32 {
        let row = head_dim.next_multiple_of(64) * 2;
        let consumers = if decode { 1 } else { self.consumers };
        let queries = consumers * 64 * row;
        let totals = if decode {
            0
        } else {
            consumers * 64 * head_dim * 4
        };
        let barriers = (4 * HOPPER_STAGES + 2 * consumers) * 8;
        let tasks = consumers * 40;
        let without = queries + 2 * HOPPER_STAGES * self.tile * row + totals + barriers + tasks;
        // Codes of a tile, and two barriers.
        let slot = self.tile * (head_dim + head_dim / 8) + 16;
        let slots = ((HOPPER_SHARED - without) / slot).min(HOPPER_SLOTS);
        without + if packed { slots * slot } else { 0 }
    }

    /// As `Shape::THREADS` when decoding.
    fn decode_threads(head_dim: u32, packed: bool) -> u32 {
        match (packed, head_dim) {
            (false, _) => 256,
            (true, 256) => 384,
            (true, _) => 512,
        }
    }
}

/// Warps of a block of attention_decode.cu.
fn decode_warps(head_dim: u32) -> u32 {
    if head_dim > 128 { 2 } else { 4 }
}

/// As `Decode::SHARED_BYTES` of attention_decode.cu.
fn decode_shared_bytes(head_dim: u32, packed: bool) -> u32 {
    let tiles = 2 * 16 * head_dim * 2;
    let codes = 2 * 16 * (head_dim + head_dim / 8);
    decode_warps(head_dim)
        * match packed {
            true => PORTABLE_STAGES * codes + tiles,
            false => PORTABLE_STAGES * tiles,
        }
}

/// Query rows of a tile, and positions, of attention_prefill.cu.
fn prefill_tile(head_dim: u32) -> (u32, u32) {
    if head_dim > 128 { (64, 32) } else { (128, 64) }
}

impl Attention {
    /// Loads the kernels for a model whose keys and values lie in `cache`, with all layers.
    ///
    /// # Errors
    /// When the GPU can't run them.
    ///
    /// # Panics
    /// If the model is not [supported](Self::supports) or the cache is not made of whole layers.
    pub fn load(
        device: &Device,
        path: Path,
        model: AttentionModel,
        cache: Slice<u8>,
    ) -> Result<Self, CudaError> {
        let KvShape {
            head_dim,
            block_size,
            ..
        } = model.shape;
        assert!(Self::supports(&model));
        assert!(cache.len().is_multiple_of(model.shape.layer_bytes()));
        let names = match head_dim {
            64 => [
                c"attention_prefill_64",
                c"attention_decode_64",
                c"attention_decode_packed_64",
            ],
            96 => [
                c"attention_prefill_96",
                c"attention_decode_96",
                c"attention_decode_packed_96",
            ],
            128 => [
                c"attention_prefill_128",
                c"attention_decode_128",
                c"attention_decode_packed_128",
            ],
            _ => [
                c"attention_prefill_256",
                c"attention_decode_256",
                c"attention_decode_packed_256",
            ],
        };
        let packed = model.shape.is_packed();
        let decode_name = names[1 + usize::from(packed)];
        let load_prefill = |module: &Module, bytes: u32| -> Result<_, CudaError> {
            if packed {
                return Ok(None);
            }
            let kernel = module.kernel(names[0])?;
            kernel.allow_shared_bytes(bytes)?;
            Ok(Some(kernel))
        };
        let (prefill, decode, hopper);
        match path {
            Path::Hopper => {
                let module = Module::load(device, &image!("attention_sm90a"))?;
                let sizes = HopperSizes::new(head_dim);
                prefill = load_prefill(&module, sizes.shared_bytes(head_dim, false, false))?;
                decode = module.kernel(decode_name)?;
                decode.allow_shared_bytes(sizes.shared_bytes(head_dim, true, packed))?;
                let box_rows = box_rows(block_size, sizes.tile);
                // Nobody reads a pool without layers.
                let map = match packed || cache.is_empty() {
                    true => TensorMap::UNUSED,
                    false => TensorMap::heads(cache.cast(), head_dim, box_rows)?,
                };
                hopper = Some(Hopper { map, box_rows });
            }
            Path::Portable => {
                let module = Module::load(device, &image!("attention_prefill"))?;
                let (rows, tile) = prefill_tile(head_dim);
                prefill = load_prefill(&module, (rows + 2 * tile) * head_dim * 2)?;
                decode = Module::load(device, &image!("attention_decode"))?.kernel(decode_name)?;
                decode.allow_shared_bytes(decode_shared_bytes(head_dim, packed))?;
                hopper = None;
            }
        }
        Ok(Self {
            model,
            cache,
            prefill,
            decode,
            hopper,
            sms: device.sms(),
        })
    }

    /// Whether there are kernels for a model: heads of 64, 96, 128 or 256 elements, at most 64 query heads
    /// per key/value head, blocks of a multiple of 16 positions.
    pub fn supports(model: &AttentionModel) -> bool {
        let KvShape {
            kv_heads,
            block_size,
            head_dim,
            ..
        } = model.shape;
        matches!(head_dim, 64 | 96 | 128 | 256)
            && kv_heads > 0
            && model.heads.is_multiple_of(kv_heads)
            && (1..=64).contains(&(model.heads / kv_heads))
            && block_size > 0
            && block_size.is_multiple_of(16)
            && model.scale > 0.0
    }

    fn group(&self) -> u32 {
        self.model.heads / self.model.shape.kv_heads
    }

    /// Positions of a decode split.
    pub fn split(&self) -> u32 {
        match self.hopper {
            Some(_) => HOPPER_SPLIT,
            None => PORTABLE_SPLIT,
        }
    }

    /// Query rows (a token's heads of one key/value head, token after token) of a prefill tile.
    pub fn tile_rows(&self) -> u32 {
        match self.hopper {
            Some(_) => 64 * HopperSizes::new(self.model.shape.head_dim).consumers,
            None => prefill_tile(self.model.shape.head_dim).0,
        }
    }

    /// Lists the work of sequences that compute prompt tokens, the largest first.
    pub fn prefill_work(&self, sequences: &[Sequence], window: Option<u32>, work: &mut Vec<Work>) {
        let (rows, group) = (self.tile_rows(), self.group());
        work.clear();
        for s in sequences {
            let tiles = (s.tokens * group).div_ceil(rows);
            work.extend((0..tiles).map(|part| s.work(part)));
        }
        work.sort_by_key(|w| Reverse(self.prefill_positions(w, window)));
    }

    /// About how many positions a tile of query rows meets.
    fn prefill_positions(&self, work: &Work, window: Option<u32>) -> u32 {
        let end = ((work.part + 1) * self.tile_rows()).div_ceil(self.group());
        (work.position + end.min(work.tokens)).min(window.unwrap_or(u32::MAX))
    }

    /// Lists the work of sequences that compute one new token each: the splits of positions that they see,
    /// the largest first. Where sequences have the same blocks in a split, it is read once for all.
    pub fn decode_work(
        &self,
        sequences: &[(Sequence, &[BlockId])],
        window: Option<u32>,
        list: &mut DecodeWork,
    ) {
        let (split, most) = (self.split(), self.most_sharers(window));
        let mut shareable = Vec::new();
        list.clear();
        for (s, blocks) in sequences {
            let end = s.position + 1;
            let first = window.map_or(0, |window| end.saturating_sub(window)) / split;
            for part in first..end.div_ceil(split) {
                let sharer = Sharer {
                    token: s.token,
                    position: s.position,
                    slot: list.slots,
                };
                if most > 1 && (part + 1) * split <= end {
                    let blocks = self.blocks_of(part, blocks);
                    shareable.push((part, blocks, s.table, sharer));
                } else {
                    list.push(&[sharer], s.position, s.table, part);
                }
            }
            list.slots += end.div_ceil(split) - first;
        }
        // Equal blocks become neighbours. Nearly always their ends tell them apart.
        let key = |&(part, blocks, ..): &(u32, &[BlockId], u32, Sharer)| {
            (part, blocks.first().copied(), blocks.last().copied())
        };
        shareable.sort_by_key(key);
        for same in shareable.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            for shared in same.chunks(most) {
                let (part, _, table, sharer) = shared[0];
                let position = match shared.len() {
                    1 => sharer.position,
                    _ => (part + 1) * split - 1,
                };
                let sharers: Vec<Sharer> = shared.iter().map(|s| s.3).collect();
                list.push(&sharers, position, table, part);
            }
        }
        list.work.sort_by_key(|w| Reverse(self.decode_positions(w)));
    }

    /// The blocks of a split.
    fn blocks_of<'a>(&self, part: u32, blocks: &'a [BlockId]) -> &'a [BlockId] {
        let block_size = self.model.shape.block_size;
        let first = part * self.split() / block_size;
        let end = ((part + 1) * self.split()).div_ceil(block_size);
        &blocks[first as usize..end as usize]
    }

    /// Positions of a split up to the query's own.
    fn decode_positions(&self, work: &Work) -> u32 {
        (work.position + 1 - work.part * self.split()).min(self.split())
    }

    /// How many sequences may share the work of a split.
    fn most_sharers(&self, window: Option<u32>) -> usize {
        match (&self.hopper, window) {
            (Some(_), None) => (HOPPER_DECODE_ROWS / self.group()) as usize,
            // Elsewhere a tile has 16 rows. With a window hardly anything is shared that all see.
            _ => 1,
        }
    }

    /// How many blocks should compute prompts beside decoding: prompts are bound by arithmetic, and
    /// decoding by memory, which half of the SMs can keep busy. `decodes` is empty if nothing decodes.
    pub fn prefill_blocks(
        &self,
        prompts: &[Work],
        decodes: &DecodeWork,
        window: Option<u32>,
    ) -> u32 {
        // In these units a tile and position of prompts take a Hopper GPU about as long as a position of a
        // split; and to begin and end a tile as long as some positions more.
        const TILE: u32 = 256;
        let prompts = prompts
            .iter()
            .map(|w| self.prefill_positions(w, window) + TILE);
        let decodes = decodes.work.iter().map(|w| self.decode_positions(w));
        match prompts.sum::<u32>() < decodes.sum() {
            true => self.sms / 2,
            false => ALL_BLOCKS,
        }
    }

    /// Room for decode steps with up to so many [sharers](DecodeWork::sharers); [`DecodeScratch::reset`] it before the first.
    ///
    /// # Errors
    /// When the arena is too small.
    pub fn take_scratch(
        &self,
        arena: &mut Arena,
        works: usize,
    ) -> Result<DecodeScratch, CudaError> {
        let rows = works * self.model.heads as usize;
        Ok(DecodeScratch {
            out: arena.take(rows * self.model.shape.head_dim as usize)?,
            sums: arena.take(2 * rows)?,
            counters: arena.take(self.counters(works))?,
            works,
        })
    }

    /// Bytes that [`take_scratch`](Self::take_scratch) takes.
    pub fn scratch_bytes(&self, works: usize) -> u64 {
        let rows = works * self.model.heads as usize;
        Arena::room_for::<f32>(rows * self.model.shape.head_dim as usize)
            + Arena::room_for::<f32>(2 * rows)
            + Arena::room_for::<u32>(self.counters(works))
    }

    fn counters(&self, works: usize) -> usize {
        works * (self.model.shape.kv_heads * self.group().div_ceil(16)) as usize
    }

    fn arguments(
        &self,
        step: &AttentionStep,
        layer: usize,
        qkv: Slice<bf16>,
        out: Slice<bf16>,
        scratch: Option<&DecodeScratch>,
    ) -> Arguments {
        let AttentionModel { heads, shape, .. } = self.model;
        assert!(self.cache.len() >= (layer + 1) * shape.layer_bytes());
        let q_stride = (heads + 2 * shape.kv_heads) * shape.head_dim;
        let tokens = qkv.len() / q_stride as usize;
        assert!(out.len() >= tokens * (heads * shape.head_dim) as usize);
        assert!(step.works.len() == 2);
        const UNLIMITED: u32 = i32::MAX as u32;
        let window = step
            .window
            .map_or(UNLIMITED, |window| window.min(UNLIMITED));
        assert!(window > 0);
        let log2_e = std::f32::consts::LOG2_E;
        let (scale, cap_in, cap_out) = match self.model.softcap {
            Some(cap) => (log2_e, self.model.scale / cap, cap),
            None => (self.model.scale * log2_e, 0.0, 0.0),
        };
        Arguments {
            q: qkv.address(),
            out: out.address(),
            cache: self.cache.address(),
            tables: step.tables.address(),
            work: step.work.address(),
            works: step.works.address(),
            sharers: step.sharers.address(),
            partial_out: scratch.map_or(0, |s| s.out.address()),
            partial_sum: scratch.map_or(0, |s| s.sums.address()),
            counters: scratch.map_or(0, |s| s.counters.address()),
            shape,
            layer: layer as u32,
            q_stride,
            group: self.group(),
            window,
            scale,
            cap_in,
            cap_out,
            beside: (step.beside && self.hopper.is_some()).into(),
        }
    }

    /// Attention of prompt tokens: `out` is `[tokens, heads * head_dim]`, queries come first in each
    /// row of `qkv`. It fills the SMs that the stream may fill.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// The step describes tokens inside `qkv` and blocks inside the cache, and its work is complete; all
    /// memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If a buffer is too small, or the cache has codes: see [`UnpackBlocks`](super::UnpackBlocks).
    pub unsafe fn prefill(
        &self,
        stream: &Stream,
        step: &AttentionStep,
        layer: usize,
        qkv: Slice<bf16>,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let kernel = self.prefill.as_ref();
        let kernel = kernel.expect("prompts read bfloat16");
        let arguments = self.arguments(step, layer, qkv, out, None);
        let dim = self.model.shape.head_dim;
        // SAFETY (of the launches): the types are those of the kernels, the lengths were checked, the
        // caller vouches for the rest.
        match &self.hopper {
            Some(hopper) => {
                let sizes = HopperSizes::new(dim);
                let shape = Shape::new(stream.sms(), 128 * (1 + sizes.consumers))
                    .shared_bytes(sizes.shared_bytes(dim, false, false));
                // SAFETY: see above.
                unsafe { kernel.launch(stream, shape, &(arguments, hopper.map, hopper.box_rows)) }
            }
            None => {
                let (rows, tile) = prefill_tile(dim);
                let shape =
                    Shape::new(2 * stream.sms(), 128).shared_bytes((rows + 2 * tile) * dim * 2);
                // SAFETY: see above.
                unsafe { kernel.launch(stream, shape, &(arguments,)) }
            }
        }
    }

    /// Attention of one new token per sequence; as [`prefill`](Self::prefill).
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// As [`prefill`](Self::prefill). No other step uses the scratch meanwhile. If it runs beside prompts, their
    /// attention is what was queued last on the stream.
    ///
    /// # Panics
    /// If a buffer is too small.
    pub unsafe fn decode(
        &self,
        stream: &Stream,
        step: &AttentionStep,
        scratch: &DecodeScratch,
        layer: usize,
        qkv: Slice<bf16>,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        assert!(step.sharers.len() <= scratch.works, "decode scratch");
        let arguments = self.arguments(step, layer, qkv, out, Some(scratch));
        let dim = self.model.shape.head_dim;
        match &self.hopper {
            Some(hopper) => {
                let packed = self.model.shape.is_packed();
                let shared = HopperSizes::new(dim).shared_bytes(dim, true, packed);
                let threads = HopperSizes::decode_threads(dim, packed);
                let shape = Shape::new(stream.sms(), threads).shared_bytes(shared);
                let (kernel, Hopper { map, box_rows }) = (&self.decode, hopper);
                // SAFETY: as in `prefill`.
                unsafe {
                    match packed {
                        true => kernel.launch(stream, shape, &(arguments,)),
                        false => kernel.launch(stream, shape, &(arguments, *map, *box_rows)),
                    }
                }
            }
            None => {
                let per_sm = (2 * 128 / dim).max(2);
                let shape = Shape::new(per_sm * stream.sms(), 32 * decode_warps(dim))
                    .shared_bytes(decode_shared_bytes(dim, self.model.shape.is_packed()));
                // SAFETY: as in `prefill`.
                unsafe {
                    self.decode
                        .launch(stream, shape, &(arguments, PORTABLE_SPLIT))
                }
            }
        }
    }
}

/// Rows of a box: it lies inside a block, and boxes fill a tile.
fn box_rows(block_size: u32, tile: u32) -> u32 {
    let fits = |rows: &u32| block_size.is_multiple_of(*rows) && tile.is_multiple_of(*rows);
    [128, 64, 32, 16].into_iter().find(fits).unwrap_or(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_fill_tiles_and_stay_inside_blocks() {
        for tile in [64, 128] {
            for block_size in (16..=512).step_by(16) {
                let rows = box_rows(block_size, tile);
                assert!(
                    block_size.is_multiple_of(rows) && tile.is_multiple_of(rows),
                    "{rows}"
                );
            }
        }
        assert_eq!(
            (box_rows(16, 128), box_rows(48, 128), box_rows(256, 64)),
            (16, 16, 64)
        );
    }

    /// What attention.cuh declares.
    #[test]
    fn what_kernels_read_has_their_layout() {
        assert_eq!((size_of::<Work>(), size_of::<Sharer>()), (20, 12));
        assert_eq!(size_of::<Arguments>(), 136);
        assert_eq!(std::mem::offset_of!(Arguments, shape), 80);
    }

    #[test]
    fn shared_memory_fits_a_hopper_sm() {
        for head_dim in [64, 96, 128, 256] {
            for [decode, packed] in [[false, false], [true, false], [true, true]] {
                let bytes = HopperSizes::new(head_dim).shared_bytes(head_dim, decode, packed);
                assert!(bytes <= HOPPER_SHARED);
            }
        }
    }
}
