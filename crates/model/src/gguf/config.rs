//! What a file's metadata says about the transformer.

use super::{Array, Gguf, Value};
use crate::config::limit;
use crate::rope::{long_rope_magnitude, yarn_magnitude};
use crate::weights::{read_vector, rope_tensor};
use crate::{
    ARCHITECTURES, Activation, Checkpoint, LocalLayers, ModelConfig, ModelError, Rope, RopePairing,
    RopeScaling,
};

#[cfg(test)]
mod tests;

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
        let gemma = architecture == "gemma3";
        let layers = keys.size("block_count", limit::LAYERS)?;
        let hidden = keys.size("embedding_length", limit::WIDTH)?;
        let heads = keys.size("attention.head_count", limit::HEADS)?;
        let kv_heads = keys.optional_size("attention.head_count_kv", limit::HEADS)?;
        let head_dim = keys
            .optional_size("attention.key_length", limit::HEAD_DIM)?
            .unwrap_or(hidden / heads);
        let context_len = keys.size("context_length", u32::MAX)?;
        let rope = keys.rope(head_dim, context_len)?;
        let config = Self {
            architecture: architecture.to_owned(),
            layers,
            hidden,
            heads,
            kv_heads: kv_heads.unwrap_or(heads),
            head_dim,
            ffn: keys.size("feed_forward_length", limit::WIDTH)?,
            vocab_size: vocab_size(gguf)?,
            context_len: rope.reach(context_len),
            norm_eps: keys.required_f32("attention.layer_norm_rms_epsilon")?,
            local: keys.local_layers(layers, context_len, &rope)?,
            rope,
            attention_scale: match keys.f32("attention.scale")? {
                Some(scale) => scale,
                // Files don't say that Gemma 3 27B's queries are scaled as if heads were narrower.
                None if gemma && layers == 62 => (hidden as f32 / heads as f32).sqrt().recip(),
                None => (head_dim as f32).sqrt().recip(),
            },
            activation: if gemma {
                Activation::GeluTanh
            } else {
                Activation::Silu
            },
            qk_norm: matches!(architecture, "qwen3" | "gemma3"),
            post_norms: gemma,
            embedding_scale: if gemma { (hidden as f32).sqrt() } else { 1.0 },
        };
        config.check().map_err(|problem| gguf.error(problem))?;
        Ok(config)
    }
}

/// Rows of the embedding table, which the vocabulary of the tokenizer must not exceed.
fn vocab_size(gguf: &Gguf) -> Result<usize, ModelError> {
    let table = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| gguf.error("tensor `token_embd.weight` is missing"))?;
    let rows = table.dims.get(1).copied().unwrap_or(0);
    if !(1..=limit::VOCAB).contains(&rows) {
        return Err(gguf.error(format!(
            "`token_embd.weight` has {rows} rows, allowed is 1 to {}",
            limit::VOCAB
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
        self.optional_size(name, max)?
            .ok_or_else(|| self.missing(name))
    }

    /// A size in `1 ..= max`.
    fn optional_size(&self, name: &str, max: u32) -> Result<Option<usize>, ModelError> {
        match self.u32(name)? {
            Some(value) if value == 0 || value > max => Err(self.gguf.error(format!(
                "metadata `{}` is {value}, allowed is 1 to {max}",
                self.key(name)
            ))),
            value => Ok(value.map(|value| value as usize)),
        }
    }

    fn rope(&self, head_dim: usize, context_len: usize) -> Result<Rope, ModelError> {
        let dims = self.optional_size("rope.dimension_count", limit::HEAD_DIM)?;
        Ok(Rope {
            pairing: match self.architecture {
                "llama" => RopePairing::Interleaved,
                _ => RopePairing::Halves,
            },
            dims: dims.unwrap_or(head_dim),
            base: self.f32("rope.freq_base")?.unwrap_or(10_000.0),
            scaling: self.rope_scaling(context_len)?,
        })
    }

    /// Divisors come as tensors, the other kinds as metadata.
    fn rope_scaling(&self, context_len: usize) -> Result<RopeScaling, ModelError> {
        let divisors = |name| match self.gguf.tensor(name) {
            Some(tensor) => read_vector(self.gguf, tensor).map(Some),
            None => Ok(None),
        };
        if let Some(divisors) = divisors(rope_tensor::DIVISORS)? {
            return Ok(RopeScaling::Divisors(divisors));
        }
        let context = "rope.scaling.original_context_length";
        let original_context = || self.size(context, u32::MAX);
        let magnitude = self.f32("rope.scaling.attn_factor")?;
        let long_rope = (divisors(rope_tensor::SHORT)?, divisors(rope_tensor::LONG)?);
        if let (Some(short), Some(long)) = long_rope {
            let original_context = original_context()?;
            let usual = || long_rope_magnitude(context_len, original_context);
            return Ok(RopeScaling::LongRope {
                short,
                long,
                original_context,
                magnitude: magnitude.unwrap_or_else(usual),
            });
        }
        let kind = self.key("rope.scaling.type");
        match self.gguf.metadata().get_str(&kind)? {
            Some("linear") => Ok(RopeScaling::Linear {
                factor: self.required_f32("rope.scaling.factor")?,
            }),
            Some("yarn") => {
                let factor = self.required_f32("rope.scaling.factor")?;
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: self.f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    original_context: original_context()?,
                    magnitude: magnitude.unwrap_or(1.0) * yarn_magnitude(factor),
                })
            }
            Some("none") => Ok(RopeScaling::None),
            // Files from before `rope.scaling.*` existed.
            None => Ok(match self.f32("rope.scale_linear")? {
                Some(factor) if factor != 1.0 => RopeScaling::Linear { factor },
                _ => RopeScaling::None,
            }),
            Some(other) => Err(self.gguf.error(format!(
                "rope scaling `{other}` is not supported; supported: linear, yarn, and \
                 Llama 3's and Phi 3's as tensors of divisors"
            ))),
        }
    }

    /// Layers with a sliding window. A window that holds the whole context is none.
    fn local_layers(
        &self,
        layers: usize,
        context_len: usize,
        global: &Rope,
    ) -> Result<Option<LocalLayers>, ModelError> {
        let window = match self.u32("attention.sliding_window")? {
            Some(window) if window > 0 && (window as usize) < context_len => window as usize,
            _ => return Ok(None),
        };
        let gemma = self.architecture == "gemma3";
        let pattern = self.key("attention.sliding_window_pattern");
        let every = |n: usize| (1..=layers).map(|i| i % n != 0).collect();
        let layers = match self.gguf.metadata().get(&pattern) {
            Some(Value::Array(Array::Bools(local))) => local.clone(),
            Some(Value::Int(n @ 1..=0xffff)) => every(*n as usize),
            Some(_) => {
                return Err(self.gguf.error(format!(
                    "metadata `{pattern}` is neither a small number nor an array of bools"
                )));
            }
            None if gemma => every(6),
            None => vec![true; layers],
        };
        let rope = if gemma {
            Rope {
                base: self.f32("rope.freq_base_swa")?.unwrap_or(10_000.0),
                scaling: RopeScaling::None,
                ..global.clone()
            }
        } else {
            global.clone()
        };
        Ok(Some(LocalLayers {
            window,
            layers,
            rope,
        }))
    }

    /// Refuses what would silently give wrong results.
    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        let refuse = |name| {
            Err(self
                .gguf
                .error(format!("`{}` is not supported", self.key(name))))
        };
        if self.u32("expert_count")?.is_some_and(|n| n != 0) {
            return refuse("expert_count");
        }
        for (name, neutral) in [
            ("attn_logit_softcapping", 0.0),
            ("final_logit_softcapping", 0.0),
            ("logit_scale", 1.0),
            ("residual_scale", 1.0),
            ("embedding_scale", 1.0),
        ] {
            if self.f32(name)?.is_some_and(|v| v != neutral) {
                return refuse(name);
            }
        }
        let causal = self
            .gguf
            .metadata()
            .get_bool(&self.key("attention.causal"))?;
        if causal == Some(false) {
            return refuse("attention.causal");
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
