//! Configurations as the models' own repositories have them, without the keys that don't matter.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::testing::hf::TempDir;
use crate::{DummyModel, HfDirectory, check_tensors};

fn parse(json: &Value) -> HfConfig {
    HfConfig::from_json(json.to_string().as_bytes()).unwrap()
}

fn refusal(json: &Value) -> String {
    HfConfig::from_json(json.to_string().as_bytes()).unwrap_err()
}

/// `base` with further keys.
fn with(mut base: Value, more: Value) -> Value {
    let Value::Object(more) = more else {
        panic!("an object")
    };
    base.as_object_mut().unwrap().extend(more);
    base
}

fn llama_3_2_1b() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "vocab_size": 128256
    })
}

fn mistral_7b() -> Value {
    json!({
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "vocab_size": 32000
    })
}

fn qwen_2_5() -> Value {
    json!({
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "use_sliding_window": false, "vocab_size": 151936
    })
}

fn qwen_3() -> Value {
    json!({
        "attention_bias": false, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_sliding_window": false,
        "vocab_size": 151936
    })
}

fn gemma_3_1b() -> Value {
    json!({
        "attn_logit_softcapping": null, "eos_token_id": [1, 106], "final_logit_softcapping": null,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144
    })
}

fn phi_3_mini_128k() -> Value {
    json!({
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "hidden_act": "silu",
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": vec![2.5; 48], "short_factor": vec![1.0; 48],
            "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "vocab_size": 32064
    })
}

#[test]
fn llama() {
    let config = parse(&llama_3_2_1b());
    let model = &config.model;
    assert_eq!((model.layers, model.hidden, model.ffn), (16, 2048, 8192));
    assert_eq!((model.heads, model.kv_heads, model.head_dim), (32, 8, 64));
    assert_eq!((model.vocab_size, model.context_len), (128_256, 131_072));
    assert_eq!(model.attention_scale, 0.125);
    let expected = Rope {
        pairing: RopePairing::Halves,
        dims: 64,
        base: 500_000.0,
        scaling: RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        },
    };
    assert_eq!(model.rope, expected);
    assert_eq!(model.local, None);
    assert!(config.tied && !config.qkv_bias);
    assert_eq!(config.eos_ids, [128_001, 128_008, 128_009]);

    let renamed = with(
        llama_3_2_1b(),
        json!({
            "rope_scaling": null, "rope_theta": null, "torch_dtype": null, "dtype": "float16",
            "rope_parameters": {"rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0,
                "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3"},
        }),
    );
    let renamed = parse(&renamed);
    assert_eq!(renamed.model, config.model);
    assert_eq!(renamed.dtype, GgmlType::F16);
}

#[test]
fn mistral() {
    let config = parse(&mistral_7b());
    assert_eq!(config.model.architecture, "llama");
    assert_eq!(config.model.head_dim, 128);
    let local = config.model.local.unwrap();
    assert_eq!((local.window, local.layers), (4096, vec![true; 32]));
    assert_eq!(local.rope, config.model.rope);
    // Version 0.2 and later.
    let without = with(mistral_7b(), json!({"sliding_window": null}));
    assert_eq!(parse(&without).model.local, None);
}

#[test]
fn qwen() {
    let config = parse(&qwen_2_5());
    assert!(config.qkv_bias && config.tied && !config.model.qk_norm);
    assert_eq!(config.model.local, None);
    assert_eq!((config.model.head_dim, config.model.norm_eps), (64, 1e-6));
    let window = with(
        qwen_2_5(),
        json!({"use_sliding_window": true, "sliding_window": 4096}),
    );
    let local = parse(&window).model.local.unwrap();
    assert_eq!(local.layers.iter().filter(|l| **l).count(), 3);
    assert!(!local.layers[20] && local.layers[21]);

    let config = parse(&qwen_3());
    assert!(config.model.qk_norm && !config.qkv_bias);
    assert_eq!((config.model.head_dim, config.model.q_width()), (128, 2048));
}

#[test]
fn gemma() {
    let config = parse(&gemma_3_1b());
    let model = &config.model;
    assert!(config.tied && model.qk_norm && model.post_norms);
    assert_eq!(model.activation, Activation::GeluTanh);
    assert_eq!(model.embedding_scale, 1152f32.sqrt());
    assert_eq!(model.attention_scale, 1.0 / 16.0);
    assert_eq!(model.rope.base, 1_000_000.0);
    let local = model.local.as_ref().unwrap();
    assert_eq!((local.window, local.rope.base), (512, 10_000.0));
    let all = (0..26).filter(|&i| !local.layers[i]).collect::<Vec<_>>();
    assert_eq!(all, [5, 11, 17, 23]);

    // As newer versions write the same.
    let types: Vec<&str> = (1..=26)
        .map(|i| match i % 6 {
            0 => "full_attention",
            _ => "sliding_attention",
        })
        .collect();
    let renamed = with(
        gemma_3_1b(),
        json!({
            "layer_types": types, "sliding_window_pattern": null, "rope_theta": null,
            "rope_local_base_freq": null,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        }),
    );
    assert_eq!(parse(&renamed).model, config.model);

    // Scaling is for the layers that see everything.
    let scaled = with(
        gemma_3_1b(),
        json!({"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    );
    let scaled = parse(&scaled).model;
    assert_eq!(scaled.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(scaled.local.unwrap().rope.scaling, RopeScaling::None);

    let images = with(gemma_3_1b(), json!({"model_type": "gemma3"}));
    assert!(refusal(&images).contains("sees images"));
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        let capped = with(gemma_3_1b(), json!({key: 30.0}));
        assert!(refusal(&capped).contains(key));
    }
    let both_ways = with(gemma_3_1b(), json!({"use_bidirectional_attention": true}));
    assert!(refusal(&both_ways).contains("bidirectional"));
    let strange = with(gemma_3_1b(), json!({"layer_types": vec!["mamba"; 26]}));
    assert!(refusal(&strange).contains("`mamba`"));
    let short = with(gemma_3_1b(), json!({"layer_types": ["sliding_attention"]}));
    assert!(refusal(&short).contains("1 of 26 layers"));
}

#[test]
fn phi() {
    let config = parse(&phi_3_mini_128k());
    let model = &config.model;
    assert_eq!((model.head_dim, model.rope.dims), (96, 96));
    assert_eq!(model.local, None);
    let RopeScaling::LongRope {
        short,
        long,
        original_context,
        magnitude,
    } = &model.rope.scaling
    else {
        panic!("{:?}", model.rope.scaling)
    };
    assert_eq!((short, long), (&vec![1.0; 48], &vec![2.5; 48]));
    assert_eq!(*original_context, 4096);
    // sqrt(1 + ln 32 / ln 4096)
    assert!((magnitude - 1.190_24).abs() < 1e-5, "{magnitude}");

    let part = json!({"partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": vec![2.0; 36], "short_factor": vec![1.0; 36], "type": "su"}});
    assert_eq!(parse(&with(phi_3_mini_128k(), part)).model.rope.dims, 72);
    let wrong =
        json!({"rope_scaling": {"long_factor": [2.0], "short_factor": [1.0], "type": "su"}});
    assert!(refusal(&with(phi_3_mini_128k(), wrong)).contains("1 rope factors for 48"));
}

#[test]
fn yarn() {
    let scaling = json!({"rope_scaling": {"factor": 4.0, "type": "yarn",
        "original_max_position_embeddings": 32768}});
    let model = parse(&with(qwen_2_5(), scaling)).model;
    assert_eq!(model.context_len, 131_072);
    let RopeScaling::Yarn {
        factor, magnitude, ..
    } = model.rope.scaling
    else {
        panic!("{:?}", model.rope.scaling)
    };
    assert_eq!(factor, 4.0);
    assert!((magnitude - 1.138_629).abs() < 1e-5, "{magnitude}");
    for odd in [json!({"mscale": 0.7}), json!({"truncate": false})] {
        let scaling = with(json!({"factor": 4.0, "rope_type": "yarn"}), odd);
        let refused = refusal(&with(qwen_2_5(), json!({"rope_scaling": scaling})));
        assert!(refused.contains("`yarn`"), "{refused}");
    }
}

/// Random weights are exactly the tensors that the loader asks for.
#[test]
fn every_architecture_has_a_dummy() {
    for base in [
        llama_3_2_1b(),
        with(
            llama_3_2_1b(),
            json!({"attention_bias": true, "tie_word_embeddings": false}),
        ),
        mistral_7b(),
        qwen_2_5(),
        qwen_3(),
        gemma_3_1b(),
        phi_3_mini_128k(),
    ] {
        let dir = TempDir::new();
        dir.write("config.json", base.to_string());
        let directory = HfDirectory::open(dir.path()).unwrap();
        let model = DummyModel::new(&directory, 1).unwrap();
        check_tensors(&model, directory.config()).unwrap();
    }
}
