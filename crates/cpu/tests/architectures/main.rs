//! Random models of every architecture against an independent implementation in float64.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod reference;

use common::{Runner, config};
use reference::{Layer, Reference, Tensors, gelu_tanh, plain_frequencies, silu};
use spate_cpu::{CpuExecutor, CpuMode};
use spate_model::testing::{GgufBuilder, TempFile, TinyLlama, tiny_llama_builder};
use spate_model::{GgmlType, Gguf};
use spate_types::{SamplingParams, TokenId};

const CONTEXT: u32 = 512;
const HEAD_DIM: usize = 32;
const LAYERS: usize = 4;
/// Past windows and block borders.
const PROMPT: usize = 150;

fn spec(architecture: &'static str) -> TinyLlama {
    TinyLlama {
        architecture,
        layers: LAYERS as u32,
        head_dim: HEAD_DIM as u32,
        context_len: CONTEXT,
        weights: GgmlType::F32,
        value_weights: GgmlType::F32,
        ..TinyLlama::default()
    }
}

/// A model like Llama: the others say how they differ.
fn llama() -> Reference {
    Reference {
        heads: 4,
        kv_heads: 2,
        head_dim: HEAD_DIM,
        epsilon: 1e-5,
        embedding_scale: 1.0,
        attention_scale: 1.0 / (HEAD_DIM as f64).sqrt(),
        activation: silu,
        interleaved: true,
        layers: vec![layer(plain_frequencies(HEAD_DIM, 1e4)); LAYERS],
    }
}

fn layer(inverse_frequencies: Vec<f64>) -> Layer {
    Layer {
        window: usize::MAX,
        inverse_frequencies,
        magnitude: 1.0,
    }
}

/// A model whose rotated pairs are halves apart, with one kind of layer.
fn halves(layer: Layer) -> Reference {
    Reference {
        interleaved: false,
        layers: vec![layer; LAYERS],
        ..llama()
    }
}

/// Pseudo-random tokens of the byte vocabulary.
fn prompt() -> Vec<TokenId> {
    let token = |i: usize| ((i * i * 31 + i * 7 + 5) % 259) as TokenId;
    (0..PROMPT).map(token).collect()
}

/// Runs a prompt in uneven chunks and compares the logprobs of its tokens.
fn check(builder: &GgufBuilder, reference: &Reference) {
    let file = TempFile::new(&builder.build());
    let gguf = Gguf::open(file.path()).unwrap();
    let mut config = config(CpuMode::Exact);
    config.kv_cache_bytes = 8 << 20;
    let mut runner = Runner::new(CpuExecutor::load(&gguf, &config, &mut |_| {}).unwrap());
    let prompt = prompt();
    let sampling = SamplingParams {
        prompt_logprobs: Some(0),
        ..SamplingParams::default()
    };
    let run = runner.generate(&prompt, sampling, 1, 37);
    assert!(!run.failed);
    let want = reference.logprobs(&Tensors::read(&gguf), &prompt);
    assert_eq!(run.prompt_logprobs.len(), PROMPT - 1);
    let mut spread = 0.0f64;
    for (i, got) in run.prompt_logprobs.iter().enumerate() {
        let want = want[i][prompt[i + 1] as usize];
        let got = f64::from(got.logprob);
        assert!(
            (got - want).abs() < 1e-4,
            "token {}: {got}, not {want}",
            i + 1
        );
        spread = spread.max((want + (259f64).ln()).abs());
    }
    assert!(spread > 1.0, "these logprobs say something");
}

#[test]
fn llama_with_divisors_as_files_hold_them() {
    let mut spec = spec("llama");
    check(&tiny_llama_builder(&spec), &llama());
    spec.rope_factors = true;
    spec.bias = true;
    let divided = plain_frequencies(HEAD_DIM, 1e4);
    let divided = divided.iter().map(|f| f / 1.5).collect();
    let reference = Reference {
        layers: vec![layer(divided); LAYERS],
        ..llama()
    };
    check(&tiny_llama_builder(&spec), &reference);
}

#[test]
fn mistral_sees_a_window() {
    for window in [1, 15, 16, 40] {
        let spec = TinyLlama {
            window: Some(window),
            ..spec("llama")
        };
        let mut reference = llama();
        for layer in &mut reference.layers {
            layer.window = window as usize;
        }
        check(&tiny_llama_builder(&spec), &reference);
    }
}

#[test]
fn qwen2_has_biases_and_may_have_yarn() {
    let spec = TinyLlama {
        bias: true,
        tied: true,
        ..spec("qwen2")
    };
    let mut builder = tiny_llama_builder(&spec);
    builder.f32("qwen2.rope.freq_base", 1e6);
    check(&builder, &halves(layer(plain_frequencies(HEAD_DIM, 1e6))));

    builder
        .str("qwen2.rope.scaling.type", "yarn")
        .f32("qwen2.rope.scaling.factor", 4.0)
        .u32("qwen2.rope.scaling.original_context_length", 128);
    // Pairs that turn more than 32 times in 128 positions are kept, those that turn less than once
    // are slowed by 4; between is a ramp over the pairs' indices.
    let index = |turns: f64| {
        let wave_length = 128.0 / turns;
        HEAD_DIM as f64 / 2.0 * f64::ln(wave_length / std::f64::consts::TAU) / f64::ln(1e6)
    };
    let (first, last) = (index(32.0).floor().max(0.0), index(1.0).ceil());
    let plain = plain_frequencies(HEAD_DIM, 1e6);
    let frequencies = plain.iter().enumerate().map(|(i, f)| {
        let slow = ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
        f * (1.0 - slow) + f / 4.0 * slow
    });
    let reference = halves(Layer {
        magnitude: 0.1 * f64::ln(4.0) + 1.0,
        ..layer(frequencies.collect())
    });
    check(&builder, &reference);
}

#[test]
fn qwen3_normalises_queries_and_keys() {
    let reference = halves(layer(plain_frequencies(HEAD_DIM, 1e6)));
    let mut builder = tiny_llama_builder(&spec("qwen3"));
    builder.f32("qwen3.rope.freq_base", 1e6);
    check(&builder, &reference);
}

#[test]
fn gemma3_mixes_local_and_global_layers() {
    let spec = TinyLlama {
        window: Some(24),
        tied: true,
        ..spec("gemma3")
    };
    let mut builder = tiny_llama_builder(&spec);
    builder
        .f32("gemma3.rope.freq_base", 1e6)
        .str("gemma3.rope.scaling.type", "linear")
        .f32("gemma3.rope.scaling.factor", 8.0);
    let local = Layer {
        window: 24,
        ..layer(plain_frequencies(HEAD_DIM, 1e4))
    };
    let slowed = plain_frequencies(HEAD_DIM, 1e6);
    let global = layer(slowed.iter().map(|f| f / 8.0).collect());
    let reference = Reference {
        embedding_scale: 8.0, // sqrt(64)
        activation: gelu_tanh,
        layers: vec![local.clone(), local.clone(), global, local],
        ..halves(layer(Vec::new()))
    };
    check(&builder, &reference);
}

#[test]
fn phi3_has_fused_tensors_a_window_and_long_rope() {
    let spec = TinyLlama {
        window: Some(30),
        ..spec("phi3")
    };
    let dims = HEAD_DIM * 3 / 4;
    let divisor = |by: f32| {
        (0..dims / 2)
            .map(|i| 1.0 + i as f32 * by)
            .collect::<Vec<_>>()
    };
    // The context (512) is longer than the original one: the long divisors count.
    for (original, chosen) in [(128, 2.0), (512, 0.25)] {
        let mut builder = tiny_llama_builder(&spec);
        let name = "phi3.rope.dimension_count";
        builder.without(name).u32(name, dims as u32);
        builder.u32("phi3.rope.scaling.original_context_length", original);
        for (length, by) in [("short", 0.25), ("long", 2.0)] {
            let name = format!("rope_factors_{length}.weight");
            builder.floats(&name, &[dims as u64 / 2], GgmlType::F32, &divisor(by));
        }
        let frequencies = plain_frequencies(dims, 1e4);
        let divided = frequencies.iter().zip(divisor(chosen));
        let divided = divided.map(|(f, by)| f / f64::from(by));
        let longer = f64::from(CONTEXT / original);
        let reference = halves(Layer {
            window: 30,
            magnitude: (1.0 + longer.ln() / f64::from(original).ln()).sqrt(),
            ..layer(divided.collect())
        });
        check(&builder, &reference);
    }
}
