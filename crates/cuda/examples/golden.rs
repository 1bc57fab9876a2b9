//! Real models on a GPU against another engine's float32 outputs (`tests/golden`) and against the CPU:
//! `golden [--portable] [--kv-dtype bf16|int8|fp8] (MODEL.gguf GOLDEN.json)…`. Without a GPU it says so and
//! passes.

mod common;
#[path = "common/device.rs"]
mod device;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use spate_cuda::{CudaConfig, KvDtype};
use spate_model::Gguf;
use spate_types::TokenId;

use common::{Options, Output, config, cpu, run, verdict};

/// What passes: mean |Δ prompt logprob|, and the share of prompt positions with the same best token.
const MOST_APART: f64 = 0.05;
const LEAST_AGREEMENT: f64 = 0.97;

/// Greedy tokens of each case.
const GREEDY: usize = 48;

/// Where the oracle's own two best tokens are this close, another choice is no error.
const TIE: f64 = 1e-3;

struct Case {
    prompt: Vec<TokenId>,
    /// From the second token on.
    logprobs: Vec<f64>,
    greedy: Vec<Value>,
}

fn main() -> Result<ExitCode> {
    if device::first()?.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let options = Options::take(&mut args)?;
    let mut passed = true;
    for pair in args.chunks_exact(2) {
        passed &= check(Path::new(&pair[0]), Path::new(&pair[1]), &options)?;
    }
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn check(model: &Path, golden: &Path, options: &Options) -> Result<bool> {
    let cases = cases(golden)?;
    let prompts: Vec<Vec<TokenId>> = cases.iter().map(|case| case.prompt.clone()).collect();
    let gguf = Gguf::open(model)?;
    let start = Instant::now();
    let kv_dtype = options.kv_dtype.unwrap_or(KvDtype::Bf16);
    let config = CudaConfig {
        kv_cache_bytes: Some(1 << 30),
        kv_dtype,
        ..config()
    };
    let mut gpu = options.cuda(&gguf, &config)?;
    let loaded = start.elapsed();
    let got = run(&mut *gpu, &prompts, GREEDY)?;
    drop(gpu);
    // Prompts alone: each gives one token.
    let exact = run(&mut *cpu(&gguf)?, &prompts, 1)?;

    let positions: usize = cases.iter().map(|case| case.logprobs.len()).sum();
    let (mut apart, mut same_best, mut same, mut length) = (0.0, 0, 0, 0);
    for ((case, got), exact) in cases.iter().zip(&got).zip(&exact) {
        apart += common::mean_difference(&got.prompt, &case.logprobs) * case.logprobs.len() as f64;
        let best = got.prompt.iter().zip(&exact.prompt);
        same_best += best.filter(|(a, b)| a.top[0].0 == b.top[0].0).count();
        same += greedy_prefix(case, got);
        length += case.greedy.len();
    }
    let apart = apart / positions as f64;
    let agreement = same_best as f64 / positions as f64;
    let passed = apart <= MOST_APART && agreement >= LEAST_AGREEMENT;
    println!(
        "{} {}, KV {kv_dtype:?}{}: loaded in {loaded:.1?}; mean |Δ prompt logprob| {apart:.5} over {positions} positions, same best \
         token at {:.2} %; {same} of {length} greedy tokens before the first difference",
        verdict(passed),
        model.file_name().unwrap_or_default().display(),
        options.path(),
        agreement * 100.0
    );
    Ok(passed)
}

fn cases(golden: &Path) -> Result<Vec<Case>> {
    let golden: Value = serde_json::from_slice(&std::fs::read(golden)?)?;
    let array = |value: &Value, key: &'static str| {
        let array = value[key].as_array().cloned();
        array.context(key)
    };
    let cases = array(&golden, "cases")?;
    let read = |case: &Value| {
        let prompt = array(case, "prompt_tokens")?;
        let logprobs = array(case, "prompt_logprobs")?;
        Ok(Case {
            prompt: prompt
                .iter()
                .flat_map(Value::as_u64)
                .map(|id| id as TokenId)
                .collect(),
            logprobs: logprobs[1..].iter().flat_map(Value::as_f64).collect(),
            greedy: array(case, "greedy")?,
        })
    };
    cases.iter().map(read).collect()
}

/// Tokens before the first that the oracle did not choose, or that it nearly did.
fn greedy_prefix(case: &Case, output: &Output) -> usize {
    let steps = case.greedy.iter().zip(&output.tokens);
    let differs =
        |(step, token): (&Value, &TokenId)| step["token"].as_u64() != Some(u64::from(*token));
    match steps.clone().position(differs) {
        None => case.greedy.len(),
        Some(at) => {
            let logprob = |rank: usize| case.greedy[at]["top"][rank][1].as_f64();
            let is_tie = logprob(0).zip(logprob(1)).is_some_and(|(a, b)| a - b < TIE);
            if is_tie { case.greedy.len() } else { at }
        }
    }
}
