use crate::{Checkpoint, Gguf, ModelError};

/// Architectures that [`ModelConfig::from_gguf`] knows.
pub const ARCHITECTURES: &[&str] = &["llama"];

/// Limits on what a file may claim. They are far above any real model and keep products of sizes
/// inside 64 bits.
pub(crate) const MAX_LAYERS: u32 = 1024;
pub(crate) const MAX_WIDTH: u32 = 1 << 20;
pub(crate) const MAX_HEADS: u32 = 1024;
const MAX_HEAD_DIM: u32 = 512;
pub(crate) const MAX_VOCAB: u64 = 1 << 24;

/// Everything about a decoder-only transformer that is not a weight.
///
/// Architectures differ in these values, not in code: [`crate::Transformer`] is written once.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// As the file names it, such as `llama`.
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
    /// Rotary position embedding.
    pub rope: Rope,
    /// Attention scores are multiplied by it; 1 / sqrt(head_dim).
    pub attention_scale: f32,
    /// Gate activation of the feed-forward block.
    pub activation: Activation,
    /// Whether a head's queries and keys are RMS-normalised before the rotation (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Embeddings are multiplied by it; 1 for most models, sqrt(hidden) for Gemma.
    pub embedding_scale: f32,
}

/// Rotary position embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which elements of a head form a rotated pair.
    pub pairing: RopePairing,
    /// Rotated leading elements of each head; even, at most `head_dim`.
    pub dims: usize,
    /// Pair `i` turns by `position * base^(-2i/dims)` radians.
    pub base: f32,
    /// Positions are divided by it (linear scaling); 1 is off.
    pub linear_factor: f32,
}

/// Which elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// `(2i, 2i + 1)`: GGUF files of `llama` hold query and key rows permuted for it.
    Interleaved,
    /// `(i, i + dims/2)`: the checkpoint layout of Hugging Face models ("NeoX").
    Halves,
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
    /// Reads the configuration from a file's metadata.
    ///
    /// # Errors
    /// When the architecture is unknown, a key is missing or has a wrong type, or the values
    /// contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let architecture = gguf.architecture();
        if !ARCHITECTURES.contains(&architecture) {
            return Err(gguf.error(format!(
                "architecture `{architecture}` is not supported; supported: {}",
                ARCHITECTURES.join(", ")
            )));
        }
        let keys = Keys { gguf, architecture };
        keys.refuse_unsupported()?;
        let hidden = keys.size("embedding_length", MAX_WIDTH)?;
        let heads = keys.size("attention.head_count", MAX_HEADS)?;
        let kv_heads = match keys.u32("attention.head_count_kv")? {
            Some(_) => keys.size("attention.head_count_kv", MAX_HEADS)?,
            None => heads,
        };
        let head_dim = match keys.u32("attention.key_length")? {
            Some(_) => keys.size("attention.key_length", MAX_HEAD_DIM)?,
            None => hidden / heads,
        };
        let config = Self {
            architecture: architecture.to_owned(),
            layers: keys.size("block_count", MAX_LAYERS)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: keys.size("feed_forward_length", MAX_WIDTH)?,
            vocab_size: vocab_size(gguf)?,
            context_len: keys.size("context_length", u32::MAX)?,
            norm_eps: keys.required_f32("attention.layer_norm_rms_epsilon")?,
            rope: Rope {
                pairing: RopePairing::Interleaved,
                dims: keys
                    .u32("rope.dimension_count")?
                    .map_or(head_dim, |d| d as usize),
                base: keys.f32("rope.freq_base")?.unwrap_or(10_000.0),
                linear_factor: keys.linear_rope_factor()?,
            },
            attention_scale: (head_dim as f32).sqrt().recip(),
            activation: Activation::Silu,
            qk_norm: false,
            embedding_scale: 1.0,
        };
        config.check().map_err(|problem| gguf.error(problem))?;
        Ok(config)
    }

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

    pub(crate) fn check(&self) -> Result<(), String> {
        let Self {
            heads, kv_heads, ..
        } = *self;
        if heads % kv_heads != 0 {
            return Err(format!(
                "{heads} query heads can't share {kv_heads} key/value heads evenly"
            ));
        }
        if self.head_dim == 0 || self.head_dim > MAX_HEAD_DIM as usize {
            return Err(format!(
                "a head is {} wide, allowed is 1 to {MAX_HEAD_DIM}",
                self.head_dim
            ));
        }
        let rope = &self.rope;
        if !rope.dims.is_multiple_of(2) || rope.dims > self.head_dim {
            return Err(format!(
                "rope.dimension_count {} is odd or wider than a head ({})",
                rope.dims, self.head_dim
            ));
        }
        for (name, value) in [
            ("layer_norm_rms_epsilon", self.norm_eps),
            ("rope.freq_base", rope.base),
            ("rope scaling factor", rope.linear_factor),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(format!("{name} {value} is not a positive number"));
            }
        }
        Ok(())
    }
}

/// Rows of the embedding table, which the vocabulary of the tokenizer must not exceed.
fn vocab_size(gguf: &Gguf) -> Result<usize, ModelError> {
    let table = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| gguf.error("tensor `token_embd.weight` is missing"))?;
    let rows = table.dims.get(1).copied().unwrap_or(0);
    if !(1..=MAX_VOCAB).contains(&rows) {
        return Err(gguf.error(format!(
            "`token_embd.weight` has {rows} rows, allowed is 1 to {MAX_VOCAB}"
        )));
    }
    let tokens = gguf.metadata().get_array_str("tokenizer.ggml.tokens")?;
    match tokens {
        Some(tokens) if tokens.len() as u64 > rows => Err(gguf.error(format!(
            "the vocabulary has {} tokens, but `token_embd.weight` only {rows} rows",
            tokens.len()
        ))),
        _ => Ok(rows as usize),
    }
}

/// Typed access to the keys below `<architecture>.`.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn u32(&self, name: &str) -> Result<Option<u32>, ModelError> {
        self.gguf.metadata().get_u32(&self.key(name))
    }

    fn f32(&self, name: &str) -> Result<Option<f32>, ModelError> {
        self.gguf.metadata().get_f32(&self.key(name))
    }

    fn missing(&self, name: &str) -> ModelError {
        self.gguf
            .error(format!("metadata `{}` is missing", self.key(name)))
    }

    fn required_f32(&self, name: &str) -> Result<f32, ModelError> {
        self.f32(name)?.ok_or_else(|| self.missing(name))
    }

    /// A required size in `1 ..= max`.
    fn size(&self, name: &str, max: u32) -> Result<usize, ModelError> {
        let value = self.u32(name)?.ok_or_else(|| self.missing(name))?;
        if value == 0 || value > max {
            return Err(self.gguf.error(format!(
                "metadata `{}` is {value}, allowed is 1 to {max}",
                self.key(name)
            )));
        }
        Ok(value as usize)
    }

    /// The divisor of linear position scaling; other kinds of scaling come as a tensor
    /// (`rope_freqs.weight`, Llama 3) or are refused.
    fn linear_rope_factor(&self) -> Result<f32, ModelError> {
        let metadata = self.gguf.metadata();
        match metadata.get_str(&self.key("rope.scaling.type"))? {
            Some("linear") => self.required_f32("rope.scaling.factor"),
            // Files from before `rope.scaling.*` existed.
            None => Ok(self.f32("rope.scale_linear")?.unwrap_or(1.0)),
            Some("none") => Ok(1.0),
            Some(other) => Err(self
                .gguf
                .error(format!("rope scaling `{other}` is not supported"))),
        }
    }

    /// Refuses what would silently give wrong results.
    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        for name in ["expert_count", "attention.sliding_window"] {
            if self.u32(name)?.is_some_and(|v| v != 0) {
                return Err(self
                    .gguf
                    .error(format!("`{}` is not supported", self.key(name))));
            }
        }
        if let (Some(k), Some(v)) = (
            self.u32("attention.key_length")?,
            self.u32("attention.value_length")?,
        ) && k != v
        {
            return Err(self.gguf.error(format!(
                "keys of width {k} with values of width {v} are not supported"
            )));
        }
        Ok(())
    }
}
