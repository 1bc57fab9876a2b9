//! Hugging Face model directories for tests: built by hand, or converted from GGUF files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use half::{bf16, f16};
use serde_json::{Value, json};

use crate::quant::dequantize;
use crate::{Checkpoint, GgmlType, Gguf, ModelConfig, RopePairing, TensorInfo};

/// A directory that is removed when this is dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new, empty one.
    ///
    /// # Panics
    /// When the temporary directory can't be written.
    #[allow(clippy::new_without_default)] // it is on disk: not a value
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("spate-test-{}-{n}.d", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("the temporary directory is writable");
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file into it.
    ///
    /// # Panics
    /// When it can't be written.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("the temporary directory is writable");
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // Nothing depends on it: a leftover in the temporary directory is no failure.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Builds the bytes of a safetensors file.
#[derive(Debug, Default, Clone)]
pub struct SafetensorsBuilder {
    header: serde_json::Map<String, Value>,
    data: Vec<u8>,
}

impl SafetensorsBuilder {
    /// Adds a tensor behind the others; `shape` with the contiguous dimension last.
    pub fn tensor(&mut self, name: &str, dtype: &str, shape: &[u64], bytes: &[u8]) -> &mut Self {
        let begin = self.data.len();
        self.data.extend(bytes);
        let offsets = [begin, self.data.len()];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        self.header.insert(name.to_owned(), entry);
        self
    }

    /// The names of its tensors.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.header.keys()
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        safetensors(&Value::Object(self.header.clone()).to_string(), &self.data)
    }
}

/// A safetensors file with this header.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), data].concat()
}

/// Writes the model of a GGUF file as a Hugging Face directory without a tokenizer: `config.json` and
/// `files` safetensors with matrices of type `dtype`, which may be F32, F16 or BF16.
///
/// # Panics
/// When the model has no such form, or the directory can't be written.
pub fn convert_to_hf(gguf: &Gguf, dir: &TempDir, dtype: GgmlType, files: usize) {
    let config = gguf.config().expect("a model that can be run");
    let json = config_json(&config, gguf.tensor("output.weight").is_none(), dtype);
    dir.write("config.json", json.to_string());

    let mut builders = vec![SafetensorsBuilder::default(); files];
    let layers = config.layers;
    for tensor in gguf.tensors() {
        let (layer, name) = hf_name(&tensor.name, &config);
        let mut values = in_halves(&config, tensor, floats(gguf, tensor));
        if config.post_norms && tensor.dims.len() == 1 {
            // Gemma's norms are stored minus one.
            values.iter_mut().for_each(|v| *v -= 1.0);
        }
        let shape: Vec<u64> = tensor.dims.iter().rev().copied().collect();
        let file = layer.map_or(0, |layer| layer * files / layers);
        // Vectors as they are: a float16 norm would be another norm.
        let dtype = if shape.len() == 1 {
            GgmlType::F32
        } else {
            dtype
        };
        builders[file].tensor(&name, dtype.name(), &shape, &encode(dtype, &values));
    }
    if let [one] = &builders[..] {
        dir.write("model.safetensors", one.build());
        return;
    }
    let mut map = serde_json::Map::new();
    for (i, builder) in builders.iter().enumerate() {
        let name = format!("model-{:05}-of-{files:05}.safetensors", i + 1);
        dir.write(&name, builder.build());
        map.extend(builder.names().map(|t| (t.clone(), json!(name))));
    }
    let index = json!({"metadata": {}, "weight_map": map});
    dir.write("model.safetensors.index.json", index.to_string());
}

fn config_json(c: &ModelConfig, tied: bool, dtype: GgmlType) -> Value {
    let gemma = c.architecture == "gemma3";
    let mut json = json!({
        "model_type": if gemma { "gemma3_text" } else { &c.architecture },
        "num_hidden_layers": c.layers,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context_len,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": if gemma { "gelu_pytorch_tanh" } else { "silu" },
        "rope_theta": c.rope.base,
        "tie_word_embeddings": tied,
        "torch_dtype": match dtype {
            GgmlType::F32 => "float32",
            GgmlType::F16 => "float16",
            _ => "bfloat16",
        },
    });
    if gemma {
        json["query_pre_attn_scalar"] = json!(c.head_dim);
    }
    if let Some(local) = &c.local {
        let kind = |local: &bool| match local {
            true => "sliding_attention",
            false => "full_attention",
        };
        json["sliding_window"] = json!(local.window);
        json["rope_local_base_freq"] = json!(local.rope.base);
        json["layer_types"] = local.layers.iter().map(kind).collect();
    }
    json
}

/// The tensor's layer and its name in a Hugging Face checkpoint.
fn hf_name(name: &str, config: &ModelConfig) -> (Option<usize>, String) {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(name) = whole {
        return (None, name.to_owned());
    }
    let mut parts = name.split('.');
    let (Some("blk"), Some(layer), Some(module), Some(kind)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        panic!("tensor {name} is of no layer");
    };
    let module = match module {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_output" => "self_attn.o_proj",
        "post_attention_norm" => "post_attention_layernorm",
        "ffn_norm" if config.post_norms => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" if config.architecture == "phi3" => "mlp.gate_up_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        other => panic!("no Hugging Face name for {other}"),
    };
    let name = format!("model.layers.{layer}.{module}.{kind}");
    (layer.parse().ok(), name)
}

fn floats(gguf: &Gguf, tensor: &TensorInfo) -> Vec<f32> {
    let mut bytes = Vec::new();
    gguf.read(tensor, &mut bytes).expect("the file is whole");
    let mut values = vec![0.0; tensor.dims.iter().product::<u64>() as usize];
    dequantize(tensor.ggml_type, &bytes, &mut values).expect("the sizes were checked");
    values
}

fn encode(dtype: GgmlType, values: &[f32]) -> Vec<u8> {
    let values = values.iter().copied();
    match dtype {
        GgmlType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        GgmlType::F16 => values
            .flat_map(|v| f16::from_f32(v).to_le_bytes())
            .collect(),
        GgmlType::BF16 => values
            .flat_map(|v| bf16::from_f32(v).to_le_bytes())
            .collect(),
        other => panic!("{other} is no dtype of safetensors"),
    }
}

/// Query and key rows in the order of a Hugging Face checkpoint: GGUF's `llama` files hold the two
/// rows of a rotated pair next to each other, checkpoints half a head apart.
fn in_halves(config: &ModelConfig, tensor: &TensorInfo, values: Vec<f32>) -> Vec<f32> {
    let permuted = config.rope.pairing == RopePairing::Interleaved
        && ["attn_q.", "attn_k."]
            .iter()
            .any(|part| tensor.name.contains(part));
    if !permuted {
        return values;
    }
    let rows = *tensor.dims.last().expect("a tensor has dimensions") as usize;
    let cols = values.len() / rows;
    let half = config.head_dim / 2;
    let row = |r: usize| {
        let (head, r) = (r / config.head_dim, r % config.head_dim);
        let from = head * config.head_dim + r % half * 2 + r / half;
        &values[from * cols..][..cols]
    };
    (0..rows).flat_map(|r| row(r).iter().copied()).collect()
}
