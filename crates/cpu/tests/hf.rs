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

/// Where the two best tokens are this close, another order of additions may choose another one.
const TIE: f32 = 1e-3;

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

/// Greedy output with the two best of each step.
fn greedy(runner: &mut Runner, prompt: &[TokenId], tokens: usize) -> Sequence {
    let sampling = SamplingParams {
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let run = runner.generate(prompt, sampling, tokens, 256);
    assert!(!run.failed);
    run
}

/// Equal up to the first near-tie; returns how many were equal.
fn assert_same(a: &Sequence, b: &Sequence) -> usize {
    for (i, (x, y)) in a.output.iter().zip(&b.output).enumerate() {
        if x != y {
            let top = &a.sampled_logprobs[i].top;
            assert!(top[0].1 - top[1].1 < TIE, "token {i}: {x} or {y}, {top:?}");
            return i;
        }
    }
    a.output.len()
}

#[test]
fn tiny_models_agree() {
    for (tied, bias, files) in [(false, false, 1), (true, true, 2)] {
        let spec = TinyLlama {
            weights: GgmlType::F16,
            value_weights: GgmlType::F16,
            tied,
            bias,
            ..TinyLlama::default()
        };
        let file = TempFile::new(&tiny_llama(&spec));
        let gguf = Gguf::open(file.path()).unwrap();
        let prompt: Vec<TokenId> = (0..40).map(|i| (i * 37) % 259).collect();
        // Float16 weights are exact in either type.
        for (mode, dtype) in [
            (CpuMode::Exact, GgmlType::F32),
            (CpuMode::Fast, GgmlType::F16),
        ] {
            let (_dir, hf) = converted(&gguf, dtype, files);
            let a = greedy(&mut runner(&gguf, mode), &prompt, 40);
            let b = greedy(&mut runner(&hf, mode), &prompt, 40);
            assert_eq!(assert_same(&a, &b), 40, "no near-ties in this model");
            for (a, b) in a.sampled_logprobs.iter().zip(&b.sampled_logprobs) {
                assert!((a.logprob - b.logprob).abs() < 5e-3, "{a:?} {b:?}");
            }
        }
    }
}

#[test]
fn the_real_model_agrees() {
    let Some(path) = SMOLLM2.path() else {
        return;
    };
    let gguf = Gguf::open(&path).unwrap();
    // The expanded weights are exact in float32.
    let (_dir, hf) = converted(&gguf, GgmlType::F32, 3);
    let mut a = runner(&gguf, CpuMode::Exact);
    let mut b = runner(&hf, CpuMode::Exact);
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let mut same = 0;
    for case in golden["cases"].as_array().unwrap() {
        let ids = case["prompt_tokens"].as_array().unwrap();
        let prompt: Vec<TokenId> = ids.iter().map(|v| v.as_u64().unwrap() as u32).collect();
        if prompt.len() <= 128 {
            same += assert_same(&greedy(&mut a, &prompt, 32), &greedy(&mut b, &prompt, 32));
        }
    }
    println!("{same} tokens are equal");
    assert!(same >= 128, "{same}");
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
