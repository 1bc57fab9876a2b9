use spate_model::{Checkpoint, ModelConfig};

use crate::executor::max_seq_len;
use crate::kv::KvPlan;
use crate::linear::{LinearWeight, Scratch};
use crate::ops::LOGIT_TILE;
use crate::{CpuConfig, CpuError, CpuMode};

/// What [`CpuExecutor::load`](crate::CpuExecutor::load) will take of a model, in bytes.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// The matrices, as the mode keeps them.
    pub weights: u64,
    /// Buffers for the largest step.
    pub activations: u64,
    model: ModelConfig,
    config: CpuConfig,
    max_seq_len: u32,
}

/// A KV cache with room for given sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvEstimate {
    /// What [`CpuConfig::kv_cache_bytes`] must be; at most a block more than the pools take.
    pub bytes: u64,
    /// Blocks and bytes of the pool that every sequence fills.
    pub main: (u32, u64),
    /// The same of the pool for layers with a sliding window, if they get one.
    pub local: Option<(u32, u64)>,
}

impl Estimate {
    /// Computes it from a checkpoint's headers. How much memory `config` gives to the KV cache does
    /// not matter.
    ///
    /// # Errors
    /// When the model or the settings can't work with this backend.
    pub fn new(checkpoint: &dyn Checkpoint, config: &CpuConfig) -> Result<Self, CpuError> {
        let model = checkpoint.config()?;
        let matrices = checkpoint.tensors().iter().filter(|t| t.dims.len() == 2);
        let weights = matrices.map(|t| {
            let shape = (t.dims[1] as usize, t.dims[0] as usize);
            match config.mode {
                CpuMode::Exact => LinearWeight::exact_bytes(shape),
                CpuMode::Fast => LinearWeight::fast_bytes(t.ggml_type, shape),
            }
        });
        let estimate = Self {
            weights: weights.sum(),
            activations: activations(&model, config.max_batch_tokens.into()),
            max_seq_len: max_seq_len(&model, config)?,
            config: config.clone(),
            model,
        };
        estimate.kv_cache(1, 1)?;
        Ok(estimate)
    }

    /// The smallest KV cache in which `sequences` of `tokens` positions each have room together.
    ///
    /// # Errors
    /// When they are more than any cache can hold.
    pub fn kv_cache(&self, sequences: u32, tokens: u32) -> Result<KvEstimate, CpuError> {
        let load = (sequences, tokens);
        let (plan, bytes) = KvPlan::for_load(&self.model, &self.config, self.max_seq_len, load)?;
        Ok(KvEstimate {
            bytes,
            main: plan.main_pool(),
            local: plan.local_pool(),
        })
    }
}

/// The buffers of the forward pass, and the quantised copy of the widest input.
fn activations(c: &ModelConfig, tokens: u64) -> u64 {
    let float = size_of::<f32>() as u64;
    let [hidden, q, kv, ffn, vocab] =
        [c.hidden, c.q_width(), c.kv_width(), c.ffn, c.vocab_size].map(|n| n as u64);
    let step = 3 * hidden + (q + 2 * kv) + q + 3 * ffn;
    let logits = LOGIT_TILE as u64 * (hidden + vocab);
    let widest = hidden.max(q).max(ffn);
    (tokens * step + logits) * float + Scratch::bytes_for(tokens as usize, widest as usize)
}
