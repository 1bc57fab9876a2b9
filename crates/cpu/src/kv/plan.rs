use spate_executor::{KvMemory, LocalKv};
use spate_model::ModelConfig;

use super::{KvDtype, KvShape, TILE};
use crate::{CpuConfig, CpuError, MAX_HEAD_DIM};

const MAX_BLOCK_SIZE: usize = 1024;

/// How the memory for the KV cache is cut into pools.
#[derive(Debug, Clone)]
pub(crate) struct KvPlan {
    pub(crate) dtype: KvDtype,
    /// One layer's share of the main pool.
    pub(crate) main: KvShape,
    /// The same of the local pool, if layers with a sliding window have one.
    local: Option<(KvShape, LocalKv)>,
    /// For each layer, whether its KV is in the local pool.
    pub(crate) is_local: Vec<bool>,
}

impl KvPlan {
    /// Cuts `config.kv_cache_bytes` for sequences of up to `max_seq_len` positions.
    ///
    /// # Errors
    /// When the settings or the model's heads don't suit the kernels, or there is no room for one
    /// block.
    pub(crate) fn new(
        model: &ModelConfig,
        config: &CpuConfig,
        max_seq_len: u32,
    ) -> Result<Self, CpuError> {
        let mut plan = Self {
            dtype: config.kv_dtype(),
            main: shape(model, config)?,
            local: None,
            is_local: vec![false; model.layers],
        };
        let memory = plan.memory(model, config, max_seq_len);
        if let Some(layers) = &model.local
            && let Some((main, local)) = memory.divide(layers.window as u32)
        {
            let blocks = local.blocks as usize;
            plan.local = Some((
                KvShape {
                    blocks,
                    ..plan.main
                },
                local,
            ));
            plan.main.blocks = main as usize;
            plan.is_local.clone_from(&layers.layers);
            return Ok(plan);
        }
        let block_bytes = plan.block_bytes();
        let blocks = config.kv_cache_bytes / block_bytes;
        plan.main.blocks = blocks.min(u32::MAX.into()) as usize;
        if blocks == 0 {
            return Err(CpuError::Config(format!(
                "a KV cache of {} bytes has no room for one block of {} tokens ({block_bytes} bytes)",
                config.kv_cache_bytes, config.block_size
            )));
        }
        Ok(plan)
    }

    /// The plan for the least memory, whatever `config` says of it, in which `sequences` of `tokens`
    /// positions have room together; and the bytes of that memory.
    ///
    /// # Errors
    /// As of [`KvPlan::new`], and when blocks can't be counted.
    pub(crate) fn for_load(
        model: &ModelConfig,
        config: &CpuConfig,
        max_seq_len: u32,
        (sequences, tokens): (u32, u32),
    ) -> Result<(Self, u64), CpuError> {
        let mut config = config.clone();
        config.kv_cache_bytes = u64::MAX;
        let memory = Self::new(model, &config, max_seq_len)?.memory(model, &config, max_seq_len);
        let window = model.local.as_ref().map(|local| local.window as u32);
        let bytes = memory.needed(window, sequences, tokens).ok_or_else(|| {
            CpuError::Config(format!(
                "{sequences} sequences of {tokens} tokens need more KV blocks than can be counted"
            ))
        });
        config.kv_cache_bytes = bytes?;
        let plan = Self::new(model, &config, max_seq_len)?;
        Ok((plan, config.kv_cache_bytes))
    }

    /// What the layers take of the memory.
    fn memory(&self, model: &ModelConfig, config: &CpuConfig, max_seq_len: u32) -> KvMemory {
        let local = model.local.iter().flat_map(|local| &local.layers);
        let local = local.filter(|local| **local).count() as u64;
        let bytes = self.main.block_bytes(self.dtype);
        KvMemory {
            bytes: config.kv_cache_bytes,
            main_block: bytes * (model.layers as u64 - local),
            local_block: bytes * local,
            block_size: config.block_size,
            max_seq_len,
            max_batch_tokens: config.max_batch_tokens,
        }
    }

    /// The local pool, as the scheduler sees it.
    pub(crate) fn local(&self) -> Option<LocalKv> {
        self.local.map(|(_, local)| local)
    }

    /// A layer's share of the main pool and of the local one, which has no blocks if there is none.
    pub(crate) fn shapes(&self) -> [KvShape; 2] {
        let none = KvShape {
            blocks: 0,
            ..self.main
        };
        [self.main, self.local.map_or(none, |(shape, _)| shape)]
    }

    /// Blocks of the main pool, and the bytes of all.
    pub(crate) fn main_pool(&self) -> (u32, u64) {
        (self.main.blocks as u32, self.pool_bytes(false))
    }

    /// The same of the local pool, if there is one.
    pub(crate) fn local_pool(&self) -> Option<(u32, u64)> {
        let blocks = self.local()?.blocks;
        Some((blocks, self.pool_bytes(true)))
    }

    fn pool_bytes(&self, local: bool) -> u64 {
        let shape = self.shapes()[usize::from(local)];
        let layers = self.is_local.iter().filter(|is_local| **is_local == local);
        shape.block_bytes(self.dtype) * shape.blocks as u64 * layers.count() as u64
    }

    /// Bytes of all blocks.
    pub(crate) fn bytes(&self) -> u64 {
        self.pool_bytes(false) + self.pool_bytes(true)
    }

    /// Bytes of one block in every layer.
    fn block_bytes(&self) -> u64 {
        self.main.block_bytes(self.dtype) * self.is_local.len() as u64
    }
}

/// One layer's blocks, of which there are none yet.
fn shape(model: &ModelConfig, config: &CpuConfig) -> Result<KvShape, CpuError> {
    let (block_size, tile) = (config.block_size as usize, TILE);
    if !(tile..=MAX_BLOCK_SIZE).contains(&block_size) || !block_size.is_multiple_of(tile) {
        return Err(CpuError::Config(format!(
            "block size {block_size} is not a multiple of {tile} up to {MAX_BLOCK_SIZE}"
        )));
    }
    let head_dim = model.head_dim;
    if !head_dim.is_multiple_of(tile) || head_dim > MAX_HEAD_DIM {
        return Err(CpuError::Config(format!(
            "the CPU backend needs heads of a multiple of {tile} up to {MAX_HEAD_DIM}; the model's have {head_dim}"
        )));
    }
    Ok(KvShape {
        kv_heads: model.kv_heads,
        head_dim,
        blocks: 0,
        block_size,
    })
}
