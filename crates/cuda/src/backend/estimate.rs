use spate_executor::KvMemory;
use spate_model::Checkpoint;

use super::CudaConfig;
use super::executor::{DRIVER_RESERVE, StepPlan, check_model};
use super::loader::WeightPlan;
use crate::CudaError;
use crate::kernels::Path;

/// What [`CudaExecutor::load`](crate::CudaExecutor::load) would take of a model on a GPU, in bytes.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// The matrices, in the formats that they have on the GPU.
    pub weights: u64,
    /// Activations of the largest step, and the state of sequences.
    pub steps: u64,
    /// What is left to the driver.
    pub driver: u64,
    kv: KvMemory,
    window: Option<u32>,
}

impl Estimate {
    /// Computes it from a checkpoint's headers, without a GPU. How much memory `config` gives to the
    /// KV cache does not matter.
    ///
    /// # Errors
    /// When the model or the settings can't work with this backend.
    pub fn new(checkpoint: &dyn Checkpoint, config: &CudaConfig) -> Result<Self, CudaError> {
        let model = checkpoint.config()?;
        check_model(&model, config)?;
        // Of all GPUs those without a path of their own need most: they unpack quantised weights.
        let weights = WeightPlan::new(checkpoint, &model, Path::Portable)?;
        let steps = StepPlan::new(&model, config)?;
        let local = model.local.as_ref();
        let locals = local.map_or(0, |local| local.layers.iter().filter(|is| **is).count());
        let layer = steps.attention.shape.block_bytes() as u64;
        Ok(Self {
            weights: weights.bytes,
            steps: steps.bytes(&model, config, &weights),
            driver: DRIVER_RESERVE,
            kv: KvMemory {
                bytes: 0,
                main_block: layer * (model.layers - locals) as u64,
                local_block: layer * locals as u64,
                block_size: config.block_size,
                max_seq_len: steps.max_seq_len,
                max_batch_tokens: config.max_batch_tokens,
            },
            window: local.map(|local| local.window as u32),
        })
    }

    /// The smallest KV cache in which `sequences` of `tokens` positions each have room together; `None`
    /// if no cache is large enough.
    pub fn kv_cache(&self, sequences: u32, tokens: u32) -> Option<u64> {
        self.kv.needed(self.window, sequences, tokens)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use spate_model::Gguf;
    use spate_model::testing::{TempFile, TinyLlama, tiny_llama};

    use super::*;
    use crate::{KvDtype, Overlap};

    #[test]
    fn estimates_follow_the_model_and_the_settings() {
        let file = TempFile::new(&tiny_llama(&TinyLlama {
            hidden: 128,
            head_dim: 64,
            ffn: 192,
            ..TinyLlama::default()
        }));
        let gguf = Gguf::open(file.path()).unwrap();
        let config = CudaConfig {
            device: 0,
            block_size: 16,
            kv_cache_bytes: None,
            kv_dtype: KvDtype::Bf16,
            memory_utilization: 0.9,
            max_seq_len: 0,
            slots: 16,
            max_batch_tokens: 512,
            overlap: Overlap::Off,
            graphs: true,
        };
        let one = Estimate::new(&gguf, &config).unwrap();
        let model = gguf.config().unwrap();
        // Keys and values in bfloat16.
        let token = 2 * 2 * model.layers as u64 * model.kv_width() as u64;
        assert_eq!(one.kv_cache(3, 17), Some(3 * 32 * token));
        assert!(one.weights > 0 && one.steps > 0);
        let two = CudaConfig {
            overlap: Overlap::Streams,
            ..config.clone()
        };
        let two = Estimate::new(&gguf, &two).unwrap();
        assert!(two.steps > one.steps && two.steps < 2 * one.steps);
        let bad = CudaConfig {
            block_size: 20,
            ..config
        };
        assert!(Estimate::new(&gguf, &bad).is_err());
    }
}
