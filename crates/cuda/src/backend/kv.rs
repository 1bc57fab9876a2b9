//! Where the model's keys and values lie: one pool of blocks, or two where some layers see only a
//! window of the last positions.

use spate_executor::{KvMemory, LocalKv};
use spate_model::{ModelConfig, Weights};

use super::loader::Matrix;
use crate::CudaError;
use crate::driver::{Arena, Device, Slice, Stream};
use crate::kernels::{Attention, AttentionModel, KvDtype, KvShape, Path, UnpackBlocks};

/// The kernels that copy rows of heads whose width is no multiple of 64 may read so far behind the
/// last one.
const BEHIND: usize = 64;

/// Sizes of the pools.
#[derive(Debug, Clone)]
pub(crate) struct KvPlan {
    attention: AttentionModel,
    main: u32,
    local: Option<LocalKv>,
    /// For each layer, whether its KV is in the local pool.
    is_local: Vec<bool>,
    /// Blocks that each lane can unpack at a time, if there are codes.
    unpacked: Option<u32>,
}

impl KvPlan {
    /// Cuts `bytes` into blocks. The `shape` of `attention` has none yet.
    ///
    /// # Errors
    /// When there is no room for one block.
    pub(crate) fn new(
        model: &ModelConfig,
        attention: AttentionModel,
        bytes: u64,
        max_seq_len: u32,
        max_batch_tokens: u32,
    ) -> Result<Self, CudaError> {
        let KvShape { block_size, .. } = attention.shape;
        let layer_block = attention.shape.block_bytes() as u64;
        let mut plan = Self {
            attention,
            main: 0,
            local: None,
            is_local: vec![false; model.layers],
            unpacked: unpacked_blocks(&attention.shape, max_seq_len, max_batch_tokens),
        };
        // Places of tokens are counted in 32 bits.
        let most = u32::MAX / block_size;
        if let Some(local) = &model.local {
            let locals = local.layers.iter().filter(|local| **local).count();
            let memory = KvMemory {
                bytes: bytes.saturating_sub(2 * BEHIND as u64),
                main_block: layer_block * (model.layers - locals) as u64,
                local_block: layer_block * locals as u64,
                block_size,
                max_seq_len,
                max_batch_tokens,
            };
            let divided = memory.divide(local.window as u32);
            if let Some((main, pool)) = divided.filter(|(main, _)| *main <= most) {
                (plan.main, plan.local) = (main, Some(pool));
                plan.is_local.clone_from(&local.layers);
                return Ok(plan);
            }
        }
        let block = layer_block * model.layers as u64;
        plan.main = (bytes.saturating_sub(BEHIND as u64) / block).min(most.into()) as u32;
        if plan.main == 0 {
            return Err(CudaError::OutOfMemory {
                what: "one block of the KV cache",
                bytes: block,
                free: bytes,
            });
        }
        Ok(plan)
    }

    /// Blocks of the main pool.
    pub(crate) fn blocks(&self) -> u32 {
        self.main
    }

    /// The local pool, as the scheduler sees it.
    pub(crate) fn local(&self) -> Option<LocalKv> {
        self.local
    }

    /// Bytes that [`KvPools::new`] takes.
    pub(crate) fn bytes(&self) -> u64 {
        let pools = [Some(self.main), self.local.map(|local| local.blocks)];
        let bytes = |(which, blocks): (usize, &Option<u32>)| {
            blocks.map_or(0, |blocks| {
                room(&self.shape(blocks), self.layers(which == 1))
            })
        };
        pools.iter().enumerate().map(bytes).sum()
    }

    fn shape(&self, blocks: u32) -> KvShape {
        let shape = self.attention.shape;
        shape.with(shape.dtype(), blocks)
    }

    fn layers(&self, local: bool) -> usize {
        self.is_local.iter().filter(|is| **is == local).count()
    }
}

fn room(shape: &KvShape, layers: usize) -> u64 {
    Arena::room_for::<u8>(layers * shape.layer_bytes() + BEHIND)
}

fn take(arena: &mut Arena, shape: &KvShape, layers: usize) -> Result<Slice<u8>, CudaError> {
    let len = layers * shape.layer_bytes();
    Ok(arena.take(len + BEHIND)?.range(0..len))
}

/// The pools, in GPU memory.
pub(crate) struct KvPools {
    pub(crate) main: Pool,
    /// That of the layers with a window, if they have their own.
    pub(crate) local: Option<Pool>,
    /// For each layer, whether its KV is in the local pool, and which of that pool's layers it is.
    layers: Vec<(bool, usize)>,
    path: Path,
    attention: AttentionModel,
    unpacked: Option<u32>,
}

/// KV blocks of some layers, and the kernels that read them.
pub(crate) struct Pool {
    pub(crate) shape: KvShape,
    /// `[layers][blocks]…`, see [`KvShape`].
    pub(crate) cache: Slice<u8>,
    pub(crate) attention: Attention,
}

impl KvPools {
    pub(crate) fn new(
        device: &Device,
        path: Path,
        plan: &KvPlan,
        arena: &mut Arena,
    ) -> Result<Self, CudaError> {
        let mut pool = |blocks: u32, layers: usize| {
            let shape = plan.shape(blocks);
            let cache = take(arena, &shape, layers)?;
            let model = AttentionModel {
                shape,
                ..plan.attention
            };
            Ok::<_, CudaError>(Pool {
                shape,
                cache,
                attention: Attention::load(device, path, model, cache)?,
            })
        };
        let main = pool(plan.main, plan.layers(false))?;
        let local = plan
            .local
            .map(|local| pool(local.blocks, plan.layers(true)));
        let mut counts = [0; 2];
        let layers = plan.is_local.iter().map(|&is_local| {
            let count = &mut counts[usize::from(is_local)];
            *count += 1;
            (is_local, *count - 1)
        });
        Ok(Self {
            main,
            local: local.transpose()?,
            layers: layers.collect(),
            path,
            attention: plan.attention,
            unpacked: plan.unpacked,
        })
    }

    /// Bytes that [`take_unpacked`](Self::take_unpacked) takes.
    pub(crate) fn unpacked_bytes(&self) -> u64 {
        let blocks = self.unpacked.unwrap_or(0);
        room(&self.attention.shape.with(KvDtype::Bf16, blocks), 1)
    }

    /// Where a lane unpacks codes, if there are any.
    pub(crate) fn take_unpacked(&self, arena: &mut Arena) -> Result<Option<Unpacked>, CudaError> {
        let unpacked = self.unpacked.map(|blocks| {
            let shape = self.attention.shape.with(KvDtype::Bf16, blocks);
            let model = AttentionModel {
                shape,
                ..self.attention
            };
            let memory = take(arena, &shape, 1)?;
            let device = arena.device();
            Ok(Unpacked {
                kernel: UnpackBlocks::load(device)?,
                memory,
                attention: Attention::load(device, self.path, model, memory)?,
            })
        });
        unpacked.transpose()
    }

    /// How many blocks a lane can unpack at a time, if there are codes.
    pub(crate) fn unpacked_blocks(&self) -> Option<u32> {
        self.unpacked
    }

    /// Whether a layer's KV is in the local pool.
    pub(crate) fn is_local(&self, layer: usize) -> bool {
        self.layers[layer].0
    }

    /// A layer's pool, and which of the pool's layers it is.
    pub(crate) fn of(&self, layer: usize) -> (&Pool, usize) {
        let (is_local, index) = self.layers[layer];
        let local = self.local.as_ref().filter(|_| is_local);
        (local.unwrap_or(&self.main), index)
    }
}

/// One layer's KV of a few sequences in bfloat16: what prompts see of a cache of codes, which they read too
/// often to unpack it each time.
pub(crate) struct Unpacked {
    kernel: UnpackBlocks,
    memory: Slice<u8>,
    /// Reads them.
    pub(crate) attention: Attention,
}

/// Blocks of codes that a lane unpacks at a time: the longest sequence's, and those of a step of short ones.
fn unpacked_blocks(shape: &KvShape, max_seq_len: u32, max_batch_tokens: u32) -> Option<u32> {
    let longest = max_seq_len.div_ceil(shape.block_size);
    let blocks = longest + max_batch_tokens.div_ceil(shape.block_size);
    shape.is_packed().then_some(blocks)
}

/// Bytes that unpacked blocks take in each lane.
pub(crate) fn unpacked_bytes(shape: &KvShape, max_seq_len: u32, max_batch_tokens: u32) -> u64 {
    let blocks = unpacked_blocks(shape, max_seq_len, max_batch_tokens);
    blocks.map_or(0, |blocks| room(&shape.with(KvDtype::Bf16, blocks), 1))
}

impl Unpacked {
    /// Fills it with blocks of a layer of a pool, in this order.
    ///
    /// # Safety
    /// The blocks exist; all memory is alive until that has run.
    pub(crate) unsafe fn fill(
        &self,
        stream: &Stream,
        pool: &Pool,
        layer: usize,
        blocks: Slice<u32>,
    ) -> Result<(), CudaError> {
        let (kernel, Pool { shape, cache, .. }) = (&self.kernel, pool);
        // SAFETY: the caller vouches for it.
        unsafe { kernel.launch(stream, shape, *cache, layer, blocks, self.memory) }
    }
}

/// Bytes that [`common_keys`] takes at most.
pub(crate) fn common_key_bytes(model: &ModelConfig) -> u64 {
    model.layers as u64 * Arena::room_for::<f32>(model.kv_width())
}

/// For each layer what all its keys have in common, and the cache need not hold: the part of their bias
/// that hardly turns (see [`spate_model::Rotation::common_part`]). Qwen 2's biases can be a hundred times
/// as large as what tells keys apart, which few bits can't show beside them.
pub(crate) fn common_keys(
    model: &ModelConfig,
    weights: &Weights<Matrix, Slice<f32>>,
    max_seq_len: usize,
    stream: &Stream,
    arena: &mut Arena,
) -> Result<Vec<Option<Slice<f32>>>, CudaError> {
    let mut keys = vec![0.0; model.kv_width()];
    let layers = weights.layers.iter().enumerate().map(|(layer, weights)| {
        // A norm after the bias leaves no constant part.
        let Some(bias) = weights.qkv.bias.filter(|_| !model.qk_norm) else {
            return Ok(None);
        };
        let bias = bias.range(model.q_width()..model.q_width() + model.kv_width());
        let on_gpu = arena.take(keys.len())?;
        // SAFETY: the copy has run when `synchronize` returns; the arenas are alive.
        unsafe { stream.download(bias, &mut keys)? };
        stream.synchronize()?;
        let rope = model.rope(layer);
        let rotation = rope.rotation(max_seq_len);
        rotation.common_part(&mut keys, model.head_dim, rope.pairing, max_seq_len);
        // SAFETY: as above.
        unsafe { stream.upload(&keys, on_gpu)? };
        stream.synchronize()?;
        Ok(Some(on_gpu))
    });
    layers.collect()
}
