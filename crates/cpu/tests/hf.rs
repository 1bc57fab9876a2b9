//! Hugging Face directories give the tokens that the GGUF files they were converted from give.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Runner, SMOLLM2, Sequence, config};
use serde_json::Value;
use spate_cpu::{CpuExecutor, CpuMode};
use spate_model::testing::hf::{TempDir, convert_to_hf};
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{Checkpoint, DummyModel, GgmlType, Gguf, HfDirectory, HfModel};
use spate_types::{SamplingParams, TokenId};

const GOLDEN: &str = include_str!("../../../tests/golden/SmolLM2-135M-Instruct.Q4_1.json");

/// Where the oracle's two best tokens are this close, another choice is no error.
const TIE: f64 = 1e-3;

fn runner(checkpoint: &dyn Checkpoint, mode: CpuMode) -> Runner {
    let mut config = config(mode);
    config.kv_cache_bytes = 32 << 20;
    Runner::new(CpuExecutor::load(checkpoint, &config, &mut |_| {}).unwrap())
}

fn converted(gguf: &Gguf, dtype: GgmlType, files: usize) -> (TempDir, HfModel) {
    let dir = TempDir::new();
    convert_to_hf(gguf, &dir, dtype, files);
    let model = HfModel::open(&HfDirectory::open(dir.path()).unwrap()).unwrap();
    (dir, model)
}

fn greedy(runner: &mut Runner, prompt: &[TokenId], tokens: usize) -> Sequence {
    let sampling = SamplingParams {
        logprobs: Some(0),
        ..SamplingParams::default()
    };
    let run = runner.generate(prompt, sampling, tokens, 256);
    assert!(!run.failed);
    run
}

#[test]
fn tiny_models_of_every_architecture_agree() {
    let float = TinyLlama {
        weights: GgmlType::F16,
        value_weights: GgmlType::F16,
        layers: 3,
        ..TinyLlama::default()
    };
    let of = |architecture| TinyLlama {
        architecture,
        ..float.clone()
    };
    let specs = [
        float.clone(),
        TinyLlama {
            tied: true,
            window: Some(7),
            ..float.clone()
        },
        TinyLlama {
            bias: true,
            tied: true,
            ..of("qwen2")
        },
        of("qwen3"),
        TinyLlama {
            tied: true,
            window: Some(7),
            ..of("gemma3")
        },
        TinyLlama {
            window: Some(9),
            ..of("phi3")
        },
    ];
    let prompt: Vec<TokenId> = (0..40).map(|i| (i * 37) % 259).collect();
    for (i, spec) in specs.into_iter().enumerate() {
        let file = TempFile::new(&tiny_llama(&spec));
        let gguf = Gguf::open(file.path()).unwrap();
        // Float16 matrices are exact in either type.
        for (mode, dtype, tolerance) in [
            (CpuMode::Exact, GgmlType::F32, 1e-3),
            (CpuMode::Fast, GgmlType::F16, 5e-3),
        ] {
            let (_dir, hf) = converted(&gguf, dtype, 1 + i % 2);
            let a = greedy(&mut runner(&gguf, mode), &prompt, 24);
            let b = greedy(&mut runner(&hf, mode), &prompt, 24);
            let name = format!("{} {mode:?}", spec.architecture);
            assert_eq!(a.output, b.output, "{name}");
            for (a, b) in a.sampled_logprobs.iter().zip(&b.sampled_logprobs) {
                let difference = (a.logprob - b.logprob).abs();
                assert!(difference < tolerance, "{name}: {a:?} {b:?}");
            }
        }
    }
}

#[test]
fn the_real_model_agrees_with_the_oracle() {
    let Some(path) = SMOLLM2.path() else {
        return;
    };
    let gguf = Gguf::open(&path).unwrap();
    // The expanded weights are exact in float32.
    let (_dir, hf) = converted(&gguf, GgmlType::F32, 3);
    let mut runner = runner(&hf, CpuMode::Exact);
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let ids = case["prompt_tokens"].as_array().unwrap();
        let prompt: Vec<TokenId> = ids.iter().map(|v| v.as_u64().unwrap() as u32).collect();
        let steps = case["greedy"].as_array().unwrap();
        // The long prompt is for what depends on length: not on the file.
        if prompt.len() > 128 {
            continue;
        }
        let output = greedy(&mut runner, &prompt, steps.len().min(32)).output;
        for (i, (step, &token)) in steps.iter().zip(&output).enumerate() {
            if step["token"].as_u64() != Some(token.into()) {
                let logprob = |rank: usize| step["top"][rank][1].as_f64().unwrap();
                let gap = logprob(0) - logprob(1);
                assert!(gap < TIE, "{}: token {i} is {token}", case["name"]);
                break;
            }
        }
    }
}

#[test]
fn random_weights_give_finite_numbers() {
    let dir = TempDir::new();
    dir.write(
        "config.json",
        r#"{"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5}"#,
    );
    let directory = HfDirectory::open(dir.path()).unwrap();
    let outputs = [7, 7, 8].map(|seed| {
        let model = DummyModel::new(&directory, seed).unwrap();
        let run = greedy(&mut runner(&model, CpuMode::Fast), &[1, 2, 3], 20);
        assert!(run.sampled_logprobs.iter().all(|l| l.logprob.is_finite()));
        run.output
    });
    assert_eq!(outputs[0], outputs[1], "a seed fixes the weights");
    assert_ne!(outputs[0], outputs[2], "another gives others");
}
