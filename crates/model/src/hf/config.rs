//! `config.json` of a Hugging Face checkpoint.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::generation::Ids;
use super::rope::{RopeJson, llama3_factors};
use crate::config::{ARCHITECTURES, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH};
use crate::{Activation, GgmlType, ModelConfig, Rope, RopePairing};

/// What `config.json` says, in our terms.
#[derive(Debug)]
pub(super) struct HfConfig {
    pub(super) model: ModelConfig,
    /// Whether the output head is the embedding table.
    pub(super) tied: bool,
    /// Whether query, key and value projections have a bias.
    pub(super) qkv_bias: bool,
    /// What Llama 3's scaling divides the rotary frequencies by.
    pub(super) rope_factors: Option<Vec<f32>>,
    /// Of the weights, unless the files say otherwise.
    pub(super) dtype: GgmlType,
    /// Tokens that end the output.
    pub(super) eos_ids: Vec<u32>,
}

/// The keys that the architectures have, all together.
#[derive(Deserialize)]
struct Json {
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
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeJson>,
    /// What newer files have in place of the two before.
    rope_parameters: Option<RopeJson>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
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
        if json.quantization_config.is_some() {
            return Err(
                "`quantization_config`: quantised safetensors are not supported; use the \
                        original weights, or a GGUF file"
                    .into(),
            );
        }
        json.refuse_unsupported()?;
        let hidden = size("hidden_size", json.hidden_size, MAX_WIDTH)?;
        let heads = size("num_attention_heads", json.num_attention_heads, MAX_HEADS)?;
        let head_dim = match json.head_dim {
            Some(dim) => dim as usize,
            None => hidden / heads,
        };
        let kv_heads = json.num_key_value_heads.or(json.num_attention_heads);
        let rope = json.rope();
        let model = ModelConfig {
            architecture: architecture.to_owned(),
            layers: size("num_hidden_layers", json.num_hidden_layers, MAX_LAYERS)?,
            hidden,
            heads,
            kv_heads: size("num_key_value_heads", kv_heads, MAX_HEADS)?,
            head_dim,
            ffn: size("intermediate_size", json.intermediate_size, MAX_WIDTH)?,
            vocab_size: size("vocab_size", json.vocab_size, MAX_VOCAB as u32)?,
            context_len: size(
                "max_position_embeddings",
                json.max_position_embeddings,
                u32::MAX,
            )?,
            norm_eps: json.rms_norm_eps.unwrap_or(1e-6),
            rope: Rope {
                pairing: RopePairing::Halves,
                dims: head_dim,
                base: rope.rope_theta.or(json.rope_theta).unwrap_or(10_000.0),
                linear_factor: rope.linear_factor()?,
            },
            attention_scale: (head_dim as f32).sqrt().recip(),
            activation: json.activation()?,
            qk_norm: false,
            embedding_scale: 1.0,
        };
        model.check()?;
        Ok(Self {
            rope_factors: llama3_factors(&rope, &model.rope)?,
            model,
            tied: json.tie_word_embeddings.unwrap_or(false),
            qkv_bias: json.attention_bias.unwrap_or(false),
            dtype: json.dtype()?,
            eos_ids: json.eos_token_id.map_or_else(Vec::new, Ids::into_vec),
        })
    }
}

impl Json {
    /// As GGUF calls it.
    fn architecture(&self) -> Result<&'static str, String> {
        let given = self.model_type.as_deref().unwrap_or("");
        let known = ARCHITECTURES.iter().find(|known| match given {
            "mistral" => **known == "llama",
            _ => **known == given,
        });
        match (known, &self.auto_map) {
            (Some(known), _) => Ok(known),
            (None, Some(_)) => Err(format!(
                "model type `{given}` needs the Python code that `auto_map` names, which is never \
                 run; supported: {}",
                ARCHITECTURES.join(", ")
            )),
            (None, None) => Err(format!(
                "model type `{given}` is not supported; supported: {}",
                ARCHITECTURES.join(", ")
            )),
        }
    }

    /// Refuses what would silently give wrong results.
    fn refuse_unsupported(&self) -> Result<(), String> {
        match self.sliding_window {
            Some(window) if self.use_sliding_window != Some(false) => {
                Err(format!("`sliding_window` {window} is not supported"))
            }
            _ => Ok(()),
        }
    }

    fn rope(&self) -> RopeJson {
        let rope = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        rope.cloned().unwrap_or_default()
    }

    fn activation(&self) -> Result<Activation, String> {
        match self
            .hidden_activation
            .as_ref()
            .or(self.hidden_act.as_ref())
            .map(String::as_str)
        {
            None | Some("silu") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(format!("`hidden_act` {other} is not supported")),
        }
    }

    fn dtype(&self) -> Result<GgmlType, String> {
        match self
            .dtype
            .as_ref()
            .or(self.torch_dtype.as_ref())
            .map(String::as_str)
        {
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
