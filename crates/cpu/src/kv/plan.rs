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
    is_local: Vec<bool>,
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
        let layer = shape(model, config)?;
        let mut plan = Self {
            dtype: config.kv_dtype(),
            main: layer,
            local: None,
            is_local: vec![false; model.layers],
        };
        if let Some(local) = &model.local
            && plan.divide(local.window, &local.layers, config, max_seq_len)
        {
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

    /// Sizes two pools so that sequences of a typical length fill both alike. `false`, and no change,
    /// if that would not pay: sequences are short, or the memory is.
    fn divide(
        &mut self,
        window: usize,
        is_local: &[bool],
        config: &CpuConfig,
        max_seq_len: u32,
    ) -> bool {
        let layers = |local: bool| is_local.iter().filter(|l| **l == local).count() as u64;
        let bytes = self.main.block_bytes(self.dtype);
        let memory = KvMemory {
            bytes: config.kv_cache_bytes,
            main_block: bytes * layers(false),
            local_block: bytes * layers(true),
            block_size: config.block_size,
            max_seq_len,
            max_batch_tokens: config.max_batch_tokens,
        };
        let Some((main, local)) = memory.divide(window as u32) else {
            return false;
        };
        let mut shape = self.main;
        shape.blocks = local.blocks as usize;
        self.local = Some((shape, local));
        self.main.blocks = main as usize;
        self.is_local = is_local.to_vec();
        true
    }

    /// The local pool, as the scheduler sees it.
    pub(crate) fn local(&self) -> Option<LocalKv> {
        self.local.map(|(_, local)| local)
    }

    /// For each layer, its share of its pool, and whether that is the local one.
    pub(crate) fn layers(&self) -> impl Iterator<Item = (KvShape, bool)> {
        let local = self.local.map_or(self.main, |(shape, _)| shape);
        let shapes = self.is_local.iter();
        shapes.map(move |&is_local| (if is_local { local } else { self.main }, is_local))
    }

    /// Bytes of all blocks.
    pub(crate) fn bytes(&self) -> u64 {
        let layers = self.layers();
        let bytes = layers.map(|(shape, _)| shape.block_bytes(self.dtype) * shape.blocks as u64);
        bytes.sum()
    }

    /// Bytes of one block in every layer.
    pub(crate) fn block_bytes(&self) -> u64 {
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
