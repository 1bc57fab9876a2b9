#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::testing::{GgufBuilder, TempFile, TinyLlama, tiny_llama_builder};
use crate::{Checkpoint, Gguf};

/// Keeps what it is given; refuses matrices of `refuse` columns.
struct Keep {
    refuse: usize,
}

/// Columns, rows of each part, all bytes, bias.
type Kept = (usize, Vec<usize>, Vec<u8>, Option<Vec<f32>>);

impl Loader for Keep {
    type Matrix = Kept;
    type Vector = Vec<f32>;
    type Error = String;

    fn matrix(&self, source: MatrixSource<'_>) -> Result<Kept, String> {
        if source.cols == self.refuse {
            return Err(format!("no room for {} columns", source.cols));
        }
        let rows = source.parts.iter().map(|p| p.rows).collect();
        let mut bytes = Vec::new();
        for part in &source.parts {
            // In two pieces, as a backend with little room would.
            let (start, half) = (bytes.len(), part.bytes / 2);
            bytes.resize(start + part.bytes, 0);
            let (first, second) = bytes[start..].split_at_mut(half);
            let read = part.read_at(0, first).and(part.read_at(half, second));
            read.map_err(|e| e.to_string())?;
        }
        Ok((source.cols, rows, bytes, source.bias))
    }

    fn vector(&self, source: &[f32]) -> Result<Vec<f32>, String> {
        Ok(source.to_vec())
    }
}

type LoadedModel = (Gguf, Weights<Kept, Vec<f32>>);

fn load(builder: &GgufBuilder, refuse: usize) -> Result<LoadedModel, LoadError<String>> {
    let file = TempFile::new(&builder.build());
    let gguf = Gguf::open(file.path())?;
    let config = ModelConfig::from_gguf(&gguf)?;
    let mut shares = vec![0.0];
    let loader = Keep { refuse };
    let weights = Weights::load(&gguf, &config, &loader, 3, &mut |share| shares.push(share))?;
    assert!(
        shares.is_sorted() && shares.last() == Some(&1.0),
        "{shares:?}"
    );
    Ok((gguf, weights))
}

fn refusal(builder: &GgufBuilder) -> String {
    load(builder, 0).err().unwrap().to_string()
}

fn bytes(gguf: &Gguf, names: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for name in names {
        gguf.read(gguf.tensor(name).unwrap(), &mut bytes).unwrap();
    }
    bytes
}

#[test]
fn every_tensor_arrives_where_it_belongs() {
    let spec = TinyLlama {
        bias: true,
        ..TinyLlama::default()
    };
    let (gguf, weights) = load(&tiny_llama_builder(&spec), 0).unwrap();
    assert_eq!(weights.layers.len(), 2);
    let norm = bytes(&gguf, &["output_norm.weight"]);
    let floats = norm
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b));
    assert!(floats.eq(weights.final_norm));
    let (cols, rows, data, bias) = &weights.layers[1].qkv;
    let [q, k, v] = ["q", "k", "v"].map(|part| format!("blk.1.attn_{part}.weight"));
    assert_eq!((*cols, rows.as_slice()), (64, [64, 32, 32].as_slice()));
    assert_eq!(*data, bytes(&gguf, &[&q, &k, &v]));
    let want = [vec![0.25; 64], vec![-0.25; 32], vec![0.5; 32]].concat();
    assert_eq!(*bias, Some(want));
    let (cols, rows, data, bias) = &weights.layers[0].gate_up;
    assert_eq!(
        (*cols, rows.as_slice(), bias),
        (64, [96, 96].as_slice(), &None)
    );
    let want = bytes(&gguf, &["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"]);
    assert_eq!(*data, want);
    assert_eq!(weights.embedding.2, bytes(&gguf, &["token_embd.weight"]));
    let head = weights.head.unwrap();
    assert_eq!(head.2, bytes(&gguf, &["output.weight"]));

    let spec = TinyLlama {
        tied: true,
        ..TinyLlama::default()
    };
    let (_, tied) = load(&tiny_llama_builder(&spec), 0).unwrap();
    assert!(tied.head.is_none());
}

#[test]
fn what_does_not_fit_is_named() {
    let tiny = || tiny_llama_builder(&TinyLlama::default());
    let f32s = |n: usize| vec![0; n * 4];

    let missing = refusal(tiny().without("blk.1.ffn_up.weight"));
    assert!(
        missing.contains("tensor `blk.1.ffn_up.weight` is missing"),
        "{missing}"
    );
    let name = "blk.0.attn_norm.weight";
    let wrong = refusal(tiny().without(name).tensor(name, &[63], 0, f32s(63)));
    assert!(
        wrong.contains(name) && wrong.contains("[63]") && wrong.contains("[64]"),
        "{wrong}"
    );
    let name = "blk.0.attn_k.weight";
    let wrong = refusal(
        tiny()
            .without(name)
            .tensor(name, &[64, 16], 0, f32s(64 * 16)),
    );
    assert!(
        wrong.contains(name) && wrong.contains("[64, 16]"),
        "{wrong}"
    );
    let unknown = refusal(tiny().tensor("blk.0.attn_sinks.weight", &[4], 0, f32s(4)));
    assert!(
        unknown.contains("`blk.0.attn_sinks.weight` is not known"),
        "{unknown}"
    );
    // Some biases, not all.
    let some = refusal(tiny().tensor("blk.0.attn_q.bias", &[64], 0, f32s(64)));
    assert!(some.contains("`blk.0.attn_k.bias` is missing"), "{some}");
}

#[test]
fn what_contradicts_the_configuration_is_named() {
    let with = |key: &str, value: u32| {
        let mut builder = tiny_llama_builder(&TinyLlama::default());
        refusal(builder.without(key).u32(key, value))
    };
    assert!(with("llama.attention.head_count_kv", 3).contains("evenly"));
    assert!(with("llama.block_count", 3).contains("`blk.2.attn_norm.weight` is missing"));
    assert!(with("llama.block_count", 1).contains("`blk.1."));
    assert!(with("llama.block_count", u32::MAX).contains("allowed is 1 to"));
    assert!(with("llama.embedding_length", 0).contains("`llama.embedding_length` is 0"));
    assert!(with("llama.rope.dimension_count", 18).contains("wider than a head"));
    assert!(with("llama.rope.dimension_count", 15).contains("odd"));
    assert!(with("llama.expert_count", 8).contains("`llama.expert_count` is not supported"));
    assert!(with("llama.attention.value_length", 32).contains("not supported"));
    assert!(with("general.architecture", 1).contains("supported: llama"));

    let mut tiny = tiny_llama_builder(&TinyLlama::default());
    let key = "llama.attention.layer_norm_rms_epsilon";
    assert!(refusal(tiny.without(key)).contains("is missing"));
    assert!(refusal(tiny.f32(key, -1.0)).contains("not a positive number"));

    let mut tiny = tiny_llama_builder(&TinyLlama::default());
    tiny.str("llama.rope.scaling.type", "dynamic");
    assert!(refusal(&tiny).contains("`dynamic` is not supported"));
    let mut tiny = tiny_llama_builder(&TinyLlama::default());
    let tokens: Vec<String> = (0..260).map(|i| i.to_string()).collect();
    let key = "tokenizer.ggml.tokens";
    assert!(refusal(tiny.without(key).strs(key, &tokens)).contains("260 tokens"));
    let mut tiny = tiny_llama_builder(&TinyLlama::default());
    let key = "general.architecture";
    assert!(refusal(tiny.without(key).str(key, "rwkv")).contains("`rwkv` is not supported"));
}

#[test]
fn a_backend_that_fails_ends_it() {
    let error = load(&tiny_llama_builder(&TinyLlama::default()), 96)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("no room for 96 columns"),
        "{error}"
    );
}

#[test]
fn fused_tensors_are_cut_where_their_parts_end() {
    let spec = TinyLlama {
        architecture: "phi3",
        ..TinyLlama::default()
    };
    let (gguf, weights) = load(&tiny_llama_builder(&spec), 0).unwrap();
    let (cols, rows, data, bias) = &weights.layers[1].qkv;
    assert_eq!(
        (*cols, rows.as_slice(), bias),
        (64, [64, 32, 32].as_slice(), &None)
    );
    assert_eq!(*data, bytes(&gguf, &["blk.1.attn_qkv.weight"]));
    let (_, rows, data, _) = &weights.layers[0].gate_up;
    assert_eq!(rows.as_slice(), [96, 96]);
    assert_eq!(*data, bytes(&gguf, &["blk.0.ffn_up.weight"]));

    let name = "blk.0.attn_qkv.weight";
    let mut short = tiny_llama_builder(&spec);
    let short = refusal(
        short
            .without(name)
            .tensor(name, &[64, 96], 0, vec![0; 64 * 96 * 4]),
    );
    assert!(
        short.contains(name) && short.contains("[64, 128]"),
        "{short}"
    );
}

#[test]
fn norms_are_loaded_where_the_architecture_has_them() {
    let of = |architecture| {
        let spec = TinyLlama {
            architecture,
            ..TinyLlama::default()
        };
        let (_, mut weights) = load(&tiny_llama_builder(&spec), 0).unwrap();
        let layer = weights.layers.remove(0);
        (
            layer.qk_norms.is_some(),
            layer.attn_post_norm.is_some(),
            layer.ffn_post_norm.is_some(),
        )
    };
    assert_eq!(of("qwen2"), (false, false, false));
    assert_eq!(of("qwen3"), (true, false, false));
    assert_eq!(of("gemma3"), (true, true, true));

    let mut without = tiny_llama_builder(&TinyLlama {
        architecture: "gemma3",
        ..TinyLlama::default()
    });
    let error = refusal(without.without("blk.1.post_ffw_norm.weight"));
    assert!(
        error.contains("`blk.1.post_ffw_norm.weight` is missing"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is overwritten in the header, loading ends with weights or an error.
    #[test]
    fn damage_never_panics(at in 0usize..1 << 16, junk in prop::collection::vec(any::<u8>(), 1..9)) {
        let spec = TinyLlama { layers: 1, ..TinyLlama::default() };
        let mut bytes = tiny_llama_builder(&spec).build();
        let header = bytes.windows(18).position(|w| w == b"output_norm.weight").unwrap() + 1200;
        let at = at % header;
        bytes[at..at + junk.len()].copy_from_slice(&junk);
        let file = TempFile::new(&bytes);
        // Not all damage is visible (another letter in a token's text), but none may panic.
        let Ok(gguf) = Gguf::open(file.path()) else { return Ok(()) };
        let Ok(config) = ModelConfig::from_gguf(&gguf) else { return Ok(()) };
        let weights = Weights::load(&gguf, &config, &Keep { refuse: 0 }, 1, &mut |_| {});
        if let Ok(weights) = weights {
            prop_assert_eq!(weights.layers.len(), config.layers);
            prop_assert_eq!(weights.final_norm.len(), config.hidden);
        }
    }
}
