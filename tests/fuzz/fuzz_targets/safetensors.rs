//! Any bytes as an index of safetensors and as one of its files, with a zero byte between: an error
//! or a model, never a crash.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use spate_fuzz::{Scratch, parts, read_tensors};
use spate_model::{HfDirectory, HfModel};

const CONFIG: &str = r#"{
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "bfloat16",
    "vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 4,
    "query_pre_attn_scalar": 4, "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window_pattern": 6, "tie_word_embeddings": true
}"#;

static DIRECTORY: LazyLock<(Scratch, HfDirectory)> = LazyLock::new(|| {
    let scratch = Scratch::new();
    scratch.write("config.json", CONFIG.as_bytes());
    let directory = HfDirectory::open(scratch.path()).expect("a good configuration");
    (scratch, directory)
});

fuzz_target!(|bytes: &[u8]| {
    let (scratch, directory) = &*DIRECTORY;
    let [index, file] = parts(bytes);
    scratch.write("model.safetensors", file);
    let index_path = scratch.write("model.safetensors.index.json", index);
    if index.is_empty() {
        fs::remove_file(index_path).expect("it was just written");
    }
    if let Ok(model) = HfModel::open(directory) {
        read_tensors(&model);
    }
});
