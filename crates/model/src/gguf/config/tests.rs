#![allow(clippy::unwrap_used)]

use super::*;
use crate::GgmlType;
use crate::testing::{GgufBuilder, TempFile, TinyLlama, tiny_llama_builder};

fn tiny(architecture: &'static str) -> GgufBuilder {
    tiny_llama_builder(&TinyLlama {
        architecture,
        layers: 6,
        ..TinyLlama::default()
    })
}

fn read(builder: &GgufBuilder) -> Result<ModelConfig, String> {
    let file = TempFile::new(&builder.build());
    let gguf = Gguf::open(file.path()).map_err(|e| e.to_string())?;
    ModelConfig::from_gguf(&gguf).map_err(|e| e.to_string())
}

fn refusal(builder: &GgufBuilder) -> String {
    read(builder).expect_err("refused")
}

#[test]
fn architectures_differ_where_they_should() {
    for &architecture in ARCHITECTURES {
        let c = read(&tiny(architecture)).unwrap();
        let gemma = architecture == "gemma3";
        assert_eq!(c.architecture, architecture);
        assert_eq!(
            c.rope.pairing == RopePairing::Interleaved,
            architecture == "llama"
        );
        assert_eq!(
            c.qk_norm,
            gemma || architecture == "qwen3",
            "{architecture}"
        );
        assert_eq!(c.post_norms, gemma);
        assert_eq!(c.embedding_scale, if gemma { 8.0 } else { 1.0 });
        assert_eq!(c.attention_scale, 0.25);
        assert_eq!(c.activation == Activation::GeluTanh, gemma);
        assert_eq!(c.rope.scaling, RopeScaling::None);
        assert_eq!(c.local, None);
    }
    let unknown = refusal(
        tiny("llama")
            .without("general.architecture")
            .str("general.architecture", "rwkv6"),
    );
    assert!(
        unknown.contains("`rwkv6` is not supported; supported: llama, qwen2, qwen3, gemma3, phi3"),
        "{unknown}"
    );
}

#[test]
fn sliding_windows_follow_the_pattern() {
    let window = |architecture: &'static str, window: u32| {
        let mut builder = tiny(architecture);
        builder.u32(&format!("{architecture}.attention.sliding_window"), window);
        builder
    };
    let layers = |builder: &GgufBuilder| read(builder).unwrap().local.unwrap().layers;

    let all = read(&window("phi3", 100)).unwrap();
    assert_eq!(all.window(3), Some(100));
    assert_eq!(all.rope(3), &all.rope);
    assert_eq!(layers(&window("llama", 100)), [true; 6]);
    for none in [0, 512, 600] {
        assert_eq!(read(&window("phi3", none)).unwrap().local, None, "{none}");
    }

    let pattern = "gemma3.attention.sliding_window_pattern";
    let mut gemma = window("gemma3", 100);
    gemma.f32("gemma3.rope.freq_base", 1e6);
    assert_eq!(layers(&gemma), [true, true, false, true, true, false]);
    gemma.without(pattern);
    assert_eq!(layers(&gemma), [true, true, true, true, true, false]);
    let c = read(&gemma).unwrap();
    assert_eq!((c.window(0), c.window(5)), (Some(100), None));
    assert_eq!((c.rope(0).base, c.rope(5).base), (1e4, 1e6));
    gemma.f32("gemma3.rope.freq_base_swa", 5e3);
    assert_eq!(read(&gemma).unwrap().rope(0).base, 5e3);

    gemma.array(pattern, 7, 6, &[1, 0, 1, 0, 0, 1]);
    assert_eq!(layers(&gemma), [true, false, true, false, false, true]);
    let short = refusal(gemma.without(pattern).array(pattern, 7, 2, &[1, 0]));
    assert!(short.contains("2 of 6 layers"), "{short}");
    for bad in [0, 1 << 20] {
        let bad = refusal(gemma.without(pattern).u32(pattern, bad));
        assert!(bad.contains("sliding_window_pattern` is neither"), "{bad}");
    }
    let bad = refusal(gemma.without(pattern).str(pattern, "local"));
    assert!(bad.contains("sliding_window_pattern` is neither"), "{bad}");
}

#[test]
fn gemma_27b_scales_its_queries_otherwise() {
    let mut builder = tiny_llama_builder(&TinyLlama {
        architecture: "gemma3",
        layers: 62,
        head_dim: 32,
        ..TinyLlama::default()
    });
    assert_eq!(read(&builder).unwrap().attention_scale, 0.25);
    builder.f32("gemma3.attention.scale", 0.5);
    assert_eq!(read(&builder).unwrap().attention_scale, 0.5);
}

#[test]
fn rope_scaling_comes_as_metadata_or_tensors() {
    let scaling = |change: &dyn Fn(&mut GgufBuilder) -> &mut GgufBuilder| {
        read(change(&mut tiny("qwen2"))).map(|c| c.rope.scaling)
    };
    let kind = "qwen2.rope.scaling.type";
    let factor = "qwen2.rope.scaling.factor";
    let original = "qwen2.rope.scaling.original_context_length";
    let linear = RopeScaling::Linear { factor: 4.0 };

    assert_eq!(scaling(&|b| b.str(kind, "none")), Ok(RopeScaling::None));
    assert_eq!(
        scaling(&|b| b.str(kind, "linear").f32(factor, 4.0)),
        Ok(linear.clone())
    );
    assert_eq!(
        scaling(&|b| b.f32("qwen2.rope.scale_linear", 4.0)),
        Ok(linear)
    );
    assert_eq!(
        scaling(&|b| b.f32("qwen2.rope.scale_linear", 1.0)),
        Ok(RopeScaling::None)
    );
    let yarn = scaling(&|b| b.str(kind, "yarn").f32(factor, 4.0).u32(original, 128));
    assert_eq!(
        yarn,
        Ok(RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 128,
            magnitude: yarn_magnitude(4.0),
        })
    );
    // 128 positions, stretched by 8, are more than the 512 of the file.
    let mut far = tiny("qwen2");
    far.str(kind, "yarn").f32(factor, 8.0).u32(original, 128);
    assert_eq!(read(&far).unwrap().context_len, 1024);
    let tensor = |name, values: Vec<f32>| {
        let dims = [values.len() as u64];
        move |b: &mut GgufBuilder| {
            b.floats(name, &dims, GgmlType::F32, &values);
        }
    };
    let divisors = tensor("rope_freqs.weight", vec![1.5; 8]);
    let with = |b: &mut GgufBuilder| divisors(b);
    let got = scaling(&|b| {
        with(b);
        b
    });
    assert_eq!(got, Ok(RopeScaling::Divisors(vec![1.5; 8])));
    let (short, long) = (
        tensor("rope_factors_short.weight", vec![1.0; 8]),
        tensor("rope_factors_long.weight", vec![3.0; 8]),
    );
    let long_rope = |magnitude| RopeScaling::LongRope {
        short: vec![1.0; 8],
        long: vec![3.0; 8],
        original_context: 64,
        magnitude,
    };
    let got = scaling(&|b| {
        short(b);
        long(b);
        b.u32(original, 64)
    });
    // The context is 512: sqrt(1 + ln 8 / ln 64).
    assert_eq!(got, Ok(long_rope(1.5f32.sqrt())));
    let got = scaling(&|b| {
        short(b);
        long(b);
        b.u32(original, 64)
            .f32("qwen2.rope.scaling.attn_factor", 1.25)
    });
    assert_eq!(got, Ok(long_rope(1.25)));

    let refusal = |change: &dyn Fn(&mut GgufBuilder) -> &mut GgufBuilder, why: &str| {
        let error = scaling(change).expect_err("refused");
        assert!(error.contains(why), "{error}");
    };
    refusal(&|b| b.str(kind, "dynamic"), "`dynamic` is not supported");
    refusal(
        &|b| b.str(kind, "linear"),
        "`qwen2.rope.scaling.factor` is missing",
    );
    refusal(
        &|b| b.str(kind, "linear").f32(factor, 0.0),
        "not a positive number",
    );
    refusal(
        &|b| b.str(kind, "yarn").f32(factor, 2.0),
        "original_context_length` is missing",
    );
    for bad in [vec![1.0; 7], vec![0.0; 8], vec![f32::NAN; 8], vec![-1.0; 8]] {
        let bad = tensor("rope_freqs.weight", bad);
        refusal(
            &|b| {
                bad(b);
                b
            },
            "rope factor",
        );
    }
}

#[test]
fn what_would_give_wrong_results_is_refused() {
    let with = |change: &dyn Fn(&mut GgufBuilder) -> &mut GgufBuilder| {
        refusal(change(&mut tiny("gemma3")))
    };
    assert!(with(&|b| b.f32("gemma3.final_logit_softcapping", 30.0)).contains("softcapping"));
    assert!(with(&|b| b.f32("gemma3.logit_scale", 2.0)).contains("logit_scale"));
    assert!(with(&|b| b.bool("gemma3.attention.causal", false)).contains("causal"));
    let neutral = tiny("gemma3")
        .f32("gemma3.final_logit_softcapping", 0.0)
        .clone();
    assert!(read(&neutral).is_ok());
}
