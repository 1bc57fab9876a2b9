//! Where the model's keys and values lie: one pool of blocks, or two where some layers see only a
//! window of the last positions.

use half::bf16;
use spate_executor::{KvMemory, LocalKv};
use spate_model::ModelConfig;

use crate::CudaError;
use crate::driver::{Arena, Device, Slice};
use crate::kernels::{Attention, AttentionModel, KvShape, Path};

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
        let layer_block = block_bytes(&attention.shape);
        let mut plan = Self {
            attention,
            main: 0,
            local: None,
            is_local: vec![false; model.layers],
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
        KvShape {
            blocks,
            ..self.attention.shape
        }
    }

    fn layers(&self, local: bool) -> usize {
        self.is_local.iter().filter(|is| **is == local).count()
    }
}

fn block_bytes(shape: &KvShape) -> u64 {
    (shape.block_len() * size_of::<bf16>()) as u64
}

fn room(shape: &KvShape, layers: usize) -> u64 {
    let elements = layers * shape.layer_len() + BEHIND / size_of::<bf16>();
    Arena::room_for::<bf16>(elements)
}

/// The pools, in GPU memory.
pub(crate) struct KvPools {
    pub(crate) main: Pool,
    /// That of the layers with a window, if they have their own.
    pub(crate) local: Option<Pool>,
    /// For each layer, whether its KV is in the local pool, and which of that pool's layers it is.
    layers: Vec<(bool, usize)>,
}

/// KV blocks of some layers, and the kernels that read them.
pub(crate) struct Pool {
    pub(crate) shape: KvShape,
    /// `[layers][blocks]…`, see [`KvShape`].
    pub(crate) cache: Slice<bf16>,
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
            let (len, behind) = (layers * shape.layer_len(), BEHIND / size_of::<bf16>());
            let cache = arena.take(len + behind)?.range(0..len);
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
        })
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
