//! The whole executor on a GPU: the conformance suite on a random model of each architecture, and its
//! logprobs against the CPU's in float32: `oracle [--kv-dtype bf16|int8|fp8]`. Without a GPU it says so and
//! passes.

mod common;
#[path = "common/device.rs"]
mod device;

use std::process::ExitCode;

use anyhow::Result;
use spate_cuda::{CudaConfig, KvDtype, Overlap};
use spate_executor::conformance;
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{ARCHITECTURES, GgmlType, Gguf};
use spate_types::TokenId;

use common::{config, cpu, cuda, mean_difference, run, take_kv_dtype, verdict};

fn main() -> Result<ExitCode> {
    if device::first()?.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut passed = true;
    let mut args = std::env::args().skip(1).collect();
    let kv_dtypes = match take_kv_dtype(&mut args)? {
        Some(dtype) => vec![dtype],
        None => vec![KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8],
    };
    for kv_dtype in kv_dtypes {
        for architecture in ARCHITECTURES {
            passed &= tiny(architecture, [GgmlType::Q4_1, GgmlType::Q8_0], kv_dtype)?;
        }
    }
    passed &= tiny("llama", [GgmlType::F16; 2], KvDtype::Bf16)?;
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A random model of an architecture, with other weights for the value projection: the suite in every mode,
/// then prompt logprobs of both backends.
fn tiny(
    architecture: &'static str,
    [weights, value_weights]: [GgmlType; 2],
    kv_dtype: KvDtype,
) -> Result<bool> {
    let spec = TinyLlama {
        architecture,
        hidden: 128,
        head_dim: 64,
        ffn: 192,
        bias: architecture == "qwen2",
        window: matches!(architecture, "gemma3" | "phi3").then_some(40),
        weights,
        value_weights,
        ..TinyLlama::default()
    };
    let file = TempFile::new(&tiny_llama(&spec));
    let gguf = Gguf::open(file.path())?;
    let mut passed = true;
    for (mode, overlap, graphs) in [
        ("one lane", Overlap::Off, true),
        ("one lane, no graphs", Overlap::Off, false),
        ("two lanes", Overlap::Streams, true),
        ("two lanes, SMs kept", Overlap::DecodeSms(24), true),
    ] {
        let config = CudaConfig {
            kv_dtype,
            overlap,
            graphs,
            ..config()
        };
        let conforms = std::panic::catch_unwind(|| {
            conformance::run(&mut || cuda(&gguf, &config).expect("the GPU was opened before"));
        });
        println!(
            "{} {architecture}, KV {kv_dtype:?}, {mode}: conformance",
            verdict(conforms.is_ok())
        );
        passed &= conforms.is_ok();
    }
    let mut state = 7u32;
    let prompt: Vec<TokenId> = (0..300)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 24
        })
        .collect();
    let prompts = [prompt];
    let config = CudaConfig {
        kv_dtype,
        ..config()
    };
    let got = run(&mut *cuda(&gguf, &config)?, &prompts, 1)?;
    let want = run(&mut *cpu(&gguf)?, &prompts, 1)?;
    let want: Vec<f64> = want[0].prompt.iter().map(|l| l.logprob.into()).collect();
    let error = mean_difference(&got[0].prompt, &want);
    // A random model magnifies what is lost.
    let limit = match kv_dtype {
        KvDtype::Bf16 => 0.05,
        KvDtype::Int8 => 0.1,
        KvDtype::Fp8 => 0.3,
    };
    let is_close = error <= limit;
    println!(
        "{} {architecture}, KV {kv_dtype:?}: mean |Δ prompt logprob| {error:.5}",
        verdict(is_close)
    );
    Ok(passed && is_close)
}
