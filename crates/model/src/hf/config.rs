//! `config.json` of a Hugging Face checkpoint.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::generation::Ids;
use super::rope::{RopeJson, RopesJson};
use crate::config::limit;
use crate::{
    ARCHITECTURES, Activation, GgmlType, LocalLayers, ModelConfig, Rope, RopePairing, RopeScaling,
};

/// What `config.json` says, in our terms.
#[derive(Debug)]
pub(super) struct HfConfig {
    pub(super) model: ModelConfig,
    /// Whether the output head is the embedding table.
    pub(super) tied: bool,
    /// Whether query, key and value projections have a bias.
    pub(super) qkv_bias: bool,
    /// Of the weights, unless the files say otherwise.
    pub(super) dtype: GgmlType,
    /// Tokens that end the output.
    pub(super) eos_ids: Vec<u32>,
}

/// The keys that the architectures have, all together.
#[derive(Deserialize)]
pub(super) struct Json {
    model_type: Option<String>,
    auto_map: Option<IgnoredAny>,
    quantization_config: Option<IgnoredAny>,
    num_hidden_layers: Option<u64>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f32>,
    hidden_act: Option<String>,
    /// Comes before `hidden_act`.
    hidden_activation: Option<String>,
    pub(super) rope_theta: Option<f32>,
    rope_local_base_freq: Option<f32>,
    rope_scaling: Option<RopeJson>,
    /// What newer files have in place of the three before.
    rope_parameters: Option<RopesJson>,
    partial_rotary_factor: Option<f32>,
    pub(super) original_max_position_embeddings: Option<u64>,
    query_pre_attn_scalar: Option<f32>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    #[serde(alias = "_sliding_window_pattern")]
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    use_bidirectional_attention: Option<bool>,
    attention_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    dtype: Option<String>,
    /// The old name of `dtype`.
    torch_dtype: Option<String>,
    eos_token_id: Option<Ids>,
}

impl HfConfig {
    /// # Errors
    /// When the architecture is unknown, a key is missing or out of range, or the values contradict
    /// each other.
    pub(super) fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let json: Json = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let architecture = json.architecture()?;
        json.refuse_unsupported()?;
        let gemma = architecture == "gemma3";
        let layers = size("num_hidden_layers", json.num_hidden_layers, limit::LAYERS)?;
        let hidden = size("hidden_size", json.hidden_size, limit::WIDTH)?;
        let heads = size(
            "num_attention_heads",
            json.num_attention_heads,
            limit::HEADS,
        )?;
        // What the reference takes when the key is absent.
        let head_dim = match (json.head_dim, architecture) {
            (Some(dim), _) => size("head_dim", Some(dim), limit::HEAD_DIM)?,
            (None, "qwen3") => 128,
            (None, "gemma3") => 256,
            (None, _) => hidden / heads,
        };
        let kv_heads = json.num_key_value_heads.or(json.num_attention_heads);
        let context = size(
            "max_position_embeddings",
            json.max_position_embeddings,
            u32::MAX,
        )?;
        let rope = json.rope(gemma, head_dim, context)?;
        let model = ModelConfig {
            architecture: architecture.to_owned(),
            layers,
            hidden,
            heads,
            kv_heads: size("num_key_value_heads", kv_heads, limit::HEADS)?,
            head_dim,
            ffn: size("intermediate_size", json.intermediate_size, limit::WIDTH)?,
            vocab_size: size("vocab_size", json.vocab_size, limit::VOCAB as u32)?,
            context_len: rope.reach(context),
            norm_eps: json.rms_norm_eps.unwrap_or(1e-6),
            local: json.local_layers(gemma, layers, context, &rope)?,
            rope,
            attention_scale: match json.query_pre_attn_scalar {
                Some(width) => width.sqrt().recip(),
                None => (head_dim as f32).sqrt().recip(),
            },
            activation: json.activation()?,
            qk_norm: matches!(architecture, "qwen3" | "gemma3"),
            post_norms: gemma,
            embedding_scale: if gemma { (hidden as f32).sqrt() } else { 1.0 },
        };
        model.check()?;
        Ok(Self {
            model,
            tied: json.tie_word_embeddings.unwrap_or(gemma),
            qkv_bias: architecture == "qwen2" || json.attention_bias == Some(true),
            dtype: json.dtype()?,
            eos_ids: json.eos_token_id.map_or_else(Vec::new, Ids::into_vec),
        })
    }
}

impl Json {
    /// As GGUF calls it.
    fn architecture(&self) -> Result<&'static str, String> {
        let given = self.model_type.as_deref().unwrap_or("");
        let name = match given {
            "mistral" => "llama",
            "gemma3_text" => "gemma3",
            // Text and images: the text model is a part of it.
            "gemma3" => "",
            given => given,
        };
        let known = ARCHITECTURES.join(", ");
        match ARCHITECTURES.iter().find(|known| **known == name) {
            Some(name) => Ok(name),
            None if given == "gemma3" => Err(
                "model type `gemma3` sees images, which is not supported; use a text-only \
                 checkpoint (`gemma3_text`)"
                    .into(),
            ),
            None if self.auto_map.is_some() => Err(format!(
                "model type `{given}` needs the Python code that `auto_map` names, which is never \
                 run; supported: {known}"
            )),
            None => Err(format!(
                "model type `{given}` is not supported; supported: {known}"
            )),
        }
    }

    /// Refuses what would silently give wrong results.
    fn refuse_unsupported(&self) -> Result<(), String> {
        if self.quantization_config.is_some() {
            return Err(
                "`quantization_config`: quantised safetensors are not supported; use the original \
                 weights, or a GGUF file"
                    .into(),
            );
        }
        let caps = [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ];
        match caps.into_iter().find(|(_, cap)| cap.is_some()) {
            Some((name, _)) => Err(format!("`{name}` is not supported")),
            None if self.use_bidirectional_attention == Some(true) => {
                Err("`use_bidirectional_attention` is not supported".into())
            }
            None => Ok(()),
        }
    }

    fn rope(&self, gemma: bool, head_dim: usize, context: usize) -> Result<Rope, String> {
        let scaling = match &self.rope_parameters {
            Some(ropes) => ropes.global().clone(),
            None => self.rope_scaling.clone().unwrap_or_default(),
        };
        let usual = if gemma { 1_000_000.0 } else { 10_000.0 };
        let share = self
            .partial_rotary_factor
            .or(scaling.partial_rotary_factor)
            .unwrap_or(1.0);
        Ok(Rope {
            pairing: RopePairing::Halves,
            dims: (head_dim as f32 * share) as usize,
            base: scaling.rope_theta.or(self.rope_theta).unwrap_or(usual),
            scaling: scaling.scaling(context, self.original_max_position_embeddings)?,
        })
    }

    /// Layers with a sliding window. A window that holds the whole context is none.
    fn local_layers(
        &self,
        gemma: bool,
        layers: usize,
        context: usize,
        global: &Rope,
    ) -> Result<Option<LocalLayers>, String> {
        let window = match self.sliding_window {
            Some(window) if (window as usize) < context => window as usize,
            _ => return Ok(None),
        };
        let local: Vec<bool> = if let Some(types) = &self.layer_types {
            let is_local = |kind: &String| match kind.as_str() {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => Err(format!("`layer_types`: `{other}` is not supported")),
            };
            types.iter().map(is_local).collect::<Result<_, _>>()?
        } else if gemma {
            let n = self.sliding_window_pattern.unwrap_or(6).max(1);
            (1..=layers).map(|i| i % n != 0).collect()
        } else {
            // Qwen says where they begin, and whether the key before means anything.
            let qwen = self.max_window_layers.is_some();
            let first = self.max_window_layers.unwrap_or(0);
            let on = self.use_sliding_window.unwrap_or(!qwen);
            (0..layers).map(|i| on && i >= first).collect()
        };
        if !local.contains(&true) {
            return Ok(None);
        }
        let rope = if gemma {
            let own = self.rope_parameters.as_ref().and_then(RopesJson::local);
            let base = own.and_then(|own| own.rope_theta);
            Rope {
                base: base.or(self.rope_local_base_freq).unwrap_or(10_000.0),
                scaling: RopeScaling::None,
                ..global.clone()
            }
        } else {
            global.clone()
        };
        Ok(Some(LocalLayers {
            window,
            layers: local,
            rope,
        }))
    }

    fn activation(&self) -> Result<Activation, String> {
        let name = self.hidden_activation.as_ref().or(self.hidden_act.as_ref());
        match name.map(String::as_str) {
            None | Some("silu") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(format!("`hidden_act` {other} is not supported")),
        }
    }

    fn dtype(&self) -> Result<GgmlType, String> {
        let name = self.dtype.as_ref().or(self.torch_dtype.as_ref());
        match name.map(String::as_str) {
            Some("float32") => Ok(GgmlType::F32),
            Some("float16") => Ok(GgmlType::F16),
            None | Some("bfloat16") => Ok(GgmlType::BF16),
            Some(other) => Err(format!(
                "`dtype` {other} is not supported; supported are float32, float16 and bfloat16"
            )),
        }
    }
}

/// A required size in `1 ..= max`.
fn size(name: &str, value: Option<u64>, max: u32) -> Result<usize, String> {
    match value {
        None => Err(format!("`{name}` is missing")),
        Some(value) if value == 0 || value > max.into() => {
            Err(format!("`{name}` is {value}, allowed is 1 to {max}"))
        }
        Some(value) => Ok(value as usize),
    }
}

#[cfg(test)]
mod tests;
