//! How many tokens a step computes in about the time that it takes for one.

use spate_model::ModelConfig;

use crate::driver::Peaks;

/// Shares of a GPU's peaks that the kernels reach where they are limited by them alone.
const READ: f64 = 0.92;
const MATRIX: f64 = 0.65;

/// Seconds to launch a layer's kernels: a step of a small model takes that long even if there is hardly
/// anything to read.
const LAUNCH: f64 = 25e-6;

/// What tiles of matrix products have room for: steps of multiples of it leave none half empty.
const TILE: f64 = 128.0;

/// See [`Capacity::step_tokens`](spate_executor::Capacity::step_tokens). `None` if the driver does not know
/// the GPU's clocks.
pub(super) fn step_tokens(model: &ModelConfig, weight_bytes: u64, peaks: Peaks) -> Option<u32> {
    let attention = 2 * model.hidden * (model.q_width() + model.kv_width());
    let weights = model.layers * (attention + 3 * model.hidden * model.ffn);
    let one = weight_bytes as f64 / (READ * peaks.read);
    let one = one.max(LAUNCH * model.layers as f64);
    let each = 2.0 * weights as f64 / (MATRIX * peaks.matrix);
    let tiles = one / each / TILE;
    tiles
        .is_normal()
        .then(|| (tiles.round().max(1.0) * TILE) as u32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
    use spate_model::{Checkpoint, Gguf};

    use super::*;

    const H100: Peaks = Peaks {
        read: 3.352e12,
        matrix: 1.07e15,
    };

    fn llama_8b() -> ModelConfig {
        let file = TempFile::new(&tiny_llama(&TinyLlama::default()));
        ModelConfig {
            layers: 32,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn: 14336,
            ..Gguf::open(file.path()).unwrap().config().unwrap()
        }
    }

    #[test]
    fn weights_are_read_as_long_as_some_hundred_tokens_take() {
        let model = llama_8b();
        assert_eq!(step_tokens(&model, 16_060_000_000, H100), Some(256));
        // Quantised to 4 bits there is less to read, and as much to compute.
        assert_eq!(step_tokens(&model, 5_000_000_000, H100), Some(128));
        let a100 = Peaks {
            read: 2.039e12,
            matrix: 3.12e14,
        };
        assert_eq!(step_tokens(&model, 16_060_000_000, a100), Some(128));
    }

    #[test]
    fn a_small_model_is_launched_as_long_as_some_thousand_tokens_take() {
        let model = ModelConfig {
            layers: 30,
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            ..llama_8b()
        };
        let tokens = step_tokens(&model, 270_000_000, H100).unwrap();
        assert!((2000..3000).contains(&tokens), "{tokens}");
    }

    #[test]
    fn a_gpu_of_unknown_clocks_sets_no_pace() {
        let unknown = Peaks {
            read: 0.0,
            matrix: 0.0,
        };
        assert_eq!(step_tokens(&llama_8b(), 16_060_000_000, unknown), None);
    }
}
