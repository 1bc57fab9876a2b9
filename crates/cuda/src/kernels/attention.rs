use std::ffi::c_void;

use half::bf16;

use super::attention_work::{Sharer, Tiling, Work};
use super::{KvShape, image};
use crate::CudaError;
use crate::driver::{Arena, Device, Kernel, Module, Parameter, Shape, Slice, Stream, TensorMap};

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
    /// From [`Tiling::prefill_work`] or [`Tiling::decode_work`], for the same window.
    pub work: Slice<Work>,
    /// How many of `work` there are, and [how many blocks](Tiling::prefill_blocks) may do it: not
    /// arguments, so that a captured graph can vary them.
    pub works: Slice<u32>,
    /// Of decoding.
    pub sharers: Slice<Sharer>,
    /// Of decoding: it may run beside the attention of prompts that was queued just before.
    pub beside: bool,
    /// A query sees that many positions up to its own; all of them if `None`.
    pub window: Option<u32>,
}

/// Room for the partial results of a decode step.
#[derive(Clone, Copy)]
pub struct DecodeScratch {
    out: Slice<f32>,
    sums: Slice<f32>,
    counters: Slice<u32>,
    queue: Slice<u32>,
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
        unsafe {
            stream.fill(self.counters, 0)?;
            stream.fill(self.queue, 0)
        }
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
    queue: u64,
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

/// Works taken, blocks ended.
const QUEUE_WORDS: usize = 2;

const HOPPER_SPLIT: u32 = 1024;
/// Query rows of a tile when decoding.
const HOPPER_DECODE_ROWS: u32 = 64;
const PORTABLE_SPLIT: u32 = 256;
/// Stages of keys and of values.
const HOPPER_STAGES: u32 = 2;
const PORTABLE_STAGES: u32 = 3;
/// Works that are known before they are begun.
const HOPPER_DEALS: u32 = 4;
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
        let deals = if decode && !packed { HOPPER_DEALS } else { 0 };
        let barriers = (4 * HOPPER_STAGES + 2 * consumers + 2 * deals) * 8;
        let tasks = consumers * 40 + deals * 4;
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

    /// How the work of steps is cut.
    pub fn tiling(&self) -> Tiling {
        let KvShape {
            head_dim,
            block_size,
            ..
        } = self.model.shape;
        let group = self.group();
        match self.hopper {
            Some(_) => Tiling {
                group,
                block_size,
                tile_rows: 64 * HopperSizes::new(head_dim).consumers,
                split: HOPPER_SPLIT,
                sharers: HOPPER_DECODE_ROWS / group,
                sms: self.sms,
            },
            None => Tiling {
                group,
                block_size,
                tile_rows: prefill_tile(head_dim).0,
                split: PORTABLE_SPLIT,
                sharers: 1,
                sms: self.sms,
            },
        }
    }

    /// Room for decode steps with up to so many [sharers](super::DecodeWork::sharers);
    /// [`DecodeScratch::reset`] it before the first.
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
            queue: arena.take(QUEUE_WORDS)?,
            works,
        })
    }

    /// Bytes that [`take_scratch`](Self::take_scratch) takes.
    pub fn scratch_bytes(&self, works: usize) -> u64 {
        let rows = works * self.model.heads as usize;
        Arena::room_for::<f32>(rows * self.model.shape.head_dim as usize)
            + Arena::room_for::<f32>(2 * rows)
            + Arena::room_for::<u32>(self.counters(works))
            + Arena::room_for::<u32>(QUEUE_WORDS)
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
            queue: scratch.map_or(0, |s| s.queue.address()),
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
        assert_eq!(size_of::<Arguments>(), 144);
        assert_eq!(std::mem::offset_of!(Arguments, shape), 88);
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
