//! The whole executor on a GPU: the conformance suite on a random model of each architecture, and its
//! logprobs against the CPU's in float32. Without a GPU it says so and passes.

mod common;

use std::process::ExitCode;

use anyhow::Result;
use spate_cuda::driver::Device;
use spate_cuda::{CudaConfig, CudaError, Overlap};
use spate_executor::conformance;
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{ARCHITECTURES, GgmlType, Gguf};
use spate_types::TokenId;

use common::{config, cpu, cuda, mean_difference, run, verdict};

fn main() -> Result<ExitCode> {
    match Device::open(0) {
        Err(CudaError::Unavailable(why)) => {
            println!("skipped: {why}");
            return Ok(ExitCode::SUCCESS);
        }
        opened => drop(opened?),
    }
    let mut passed = true;
    for architecture in ARCHITECTURES {
        passed &= tiny(architecture, [GgmlType::Q4_1, GgmlType::Q8_0])?;
    }
    passed &= tiny("llama", [GgmlType::F16; 2])?;
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A random model of an architecture, with other weights for the value projection: the suite in every mode,
/// then prompt logprobs of both backends.
fn tiny(architecture: &'static str, [weights, value_weights]: [GgmlType; 2]) -> Result<bool> {
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
            overlap,
            graphs,
            ..config()
        };
        let conforms = std::panic::catch_unwind(|| {
            conformance::run(&mut || cuda(&gguf, &config).expect("the GPU was opened before"));
        });
        println!(
            "{} {architecture}, {mode}: conformance",
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
    let got = run(&mut *cuda(&gguf, &config())?, &prompts, 1)?;
    let want = run(&mut *cpu(&gguf)?, &prompts, 1)?;
    let want: Vec<f64> = want[0].prompt.iter().map(|l| l.logprob.into()).collect();
    let error = mean_difference(&got[0].prompt, &want);
    let is_close = error <= 0.05;
    println!(
        "{} {architecture}: mean |Δ prompt logprob| {error:.5}",
        verdict(is_close)
    );
    Ok(passed && is_close)
}
