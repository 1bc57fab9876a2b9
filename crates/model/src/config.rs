use crate::Rope;

/// Architectures that can be run, as GGUF files name them.
pub const ARCHITECTURES: &[&str] = &["llama", "qwen2", "qwen3", "gemma3", "phi3"];

/// Limits on what a file may claim. They are far above any real model and keep products of sizes
/// inside 64 bits.
pub(crate) mod limit {
    pub(crate) const LAYERS: u32 = 1024;
    pub(crate) const WIDTH: u32 = 1 << 20;
    pub(crate) const HEADS: u32 = 1024;
    pub(crate) const HEAD_DIM: u32 = 512;
    pub(crate) const VOCAB: u64 = 1 << 24;
}

/// Everything about a decoder-only transformer that is not a weight.
///
/// Architectures differ in these values, not in code: [`crate::Transformer`] is written once.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// As GGUF files name it, such as `llama`.
    pub architecture: String,
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Inner width of the feed-forward block.
    pub ffn: usize,
    /// Rows of the embedding table, width of the logits.
    pub vocab_size: usize,
    /// Longest sequence that the model was trained for.
    pub context_len: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Rotary position embedding of layers that see the whole sequence.
    pub rope: Rope,
    /// Layers that see only the last positions; `None` when every layer sees all.
    pub local: Option<LocalLayers>,
    /// Attention scores are multiplied by it; 1 / sqrt(head_dim) for most models.
    pub attention_scale: f32,
    /// Gate activation of the feed-forward block.
    pub activation: Activation,
    /// Whether a head's queries and keys are RMS-normalised before the rotation (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Whether a block's output is RMS-normalised before it joins the residual stream (Gemma 3).
    pub post_norms: bool,
    /// Embeddings are multiplied by it; 1 for most models, sqrt(hidden) for Gemma.
    pub embedding_scale: f32,
}

/// Layers with sliding-window attention (Beltagy et al. 2020).
#[derive(Debug, Clone, PartialEq)]
pub struct LocalLayers {
    /// Positions that a query sees, its own included.
    pub window: usize,
    /// One per layer: whether it is local.
    pub layers: Vec<bool>,
    /// Their rotary position embedding.
    pub rope: Rope,
}

/// Activation of the gate in a gated feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// The tanh approximation of GELU (Hendrycks & Gimpel 2016).
    GeluTanh,
}

impl ModelConfig {
    /// Query heads that share one key/value head.
    pub fn heads_per_kv(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads (and of all value heads) together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Positions that a query of a layer sees, its own included; `None` for all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.local_at(layer).map(|local| local.window)
    }

    /// The rotary position embedding of a layer.
    pub fn rope(&self, layer: usize) -> &Rope {
        self.local_at(layer).map_or(&self.rope, |local| &local.rope)
    }

    fn local_at(&self, layer: usize) -> Option<&LocalLayers> {
        self.local.as_ref().filter(|local| local.layers[layer])
    }

    /// What is wrong with the values, if anything. Sizes are within [`limit`] already.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self {
            heads, kv_heads, ..
        } = *self;
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "{heads} query heads can't share {kv_heads} key/value heads evenly"
            ));
        }
        if self.head_dim == 0 || self.head_dim > limit::HEAD_DIM as usize {
            return Err(format!(
                "a head is {} wide, allowed is 1 to {}",
                self.head_dim,
                limit::HEAD_DIM
            ));
        }
        for (name, value) in [
            ("the norms' epsilon", self.norm_eps),
            ("the attention scale", self.attention_scale),
            ("the embedding scale", self.embedding_scale),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(format!("{name} {value} is not a positive number"));
            }
        }
        self.rope.check(self.head_dim)?;
        let Some(local) = &self.local else {
            return Ok(());
        };
        if local.window == 0 || local.layers.len() != self.layers {
            return Err(format!(
                "a sliding window of {} positions for {} of {} layers makes no sense",
                local.window,
                local.layers.len(),
                self.layers
            ));
        }
        local.rope.check(self.head_dim)
    }
}
