//! The whole executor on a GPU against the CPU in float32, and the conformance suite:
//! `oracle [MODEL.gguf GOLDEN.json]…`. Without a GPU it says so and passes.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spate_cpu::{CpuConfig, CpuExecutor, CpuMode};
use spate_cuda::driver::Device;
use spate_cuda::{CudaConfig, CudaError, CudaExecutor, Overlap};
use spate_executor::{Batch, Bind, Executor, Input, Lane, Row, RowOutput, conformance};
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{ARCHITECTURES, GgmlType, Gguf};
use spate_types::{BlockId, LocalBlocks, Logprobs, SamplingParams, Slot, TokenId};

const BLOCK: u32 = 16;

fn main() -> Result<ExitCode> {
    match Device::open(0) {
        Err(CudaError::Unavailable(why)) => {
            println!("skipped: {why}");
            return Ok(ExitCode::SUCCESS);
        }
        opened => drop(opened?),
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut passed = true;
    for architecture in ARCHITECTURES {
        passed &= tiny(architecture, [GgmlType::Q4_1, GgmlType::Q8_0])?;
    }
    passed &= tiny("llama", [GgmlType::F16; 2])?;
    for pair in args.chunks_exact(2) {
        passed &= golden(Path::new(&pair[0]), Path::new(&pair[1]))?;
    }
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn cuda(gguf: &Gguf) -> Result<Box<dyn Executor>, CudaError> {
    let config = CudaConfig {
        device: 0,
        block_size: BLOCK,
        kv_cache_bytes: Some(64 << 20),
        memory_utilization: 0.9,
        max_seq_len: 0,
        slots: 16,
        max_batch_tokens: 512,
        overlap: Overlap::Off,
        graphs: true,
    };
    Ok(Box::new(CudaExecutor::load(gguf, &config, &mut |_| {})?))
}

fn cpu(gguf: &Gguf) -> Result<Box<dyn Executor>> {
    let config = CpuConfig {
        mode: CpuMode::Exact,
        threads: 0,
        block_size: BLOCK,
        kv_cache_bytes: 256 << 20,
        max_seq_len: 0,
        slots: 16,
        max_batch_tokens: 512,
        kv_dtype: None,
    };
    Ok(Box::new(CpuExecutor::load(gguf, &config, &mut |_| {})?))
}

/// A random model of an architecture, with other weights for the value projection: the suite, then prompt
/// logprobs of both backends.
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
    let suite = std::panic::catch_unwind(|| {
        conformance::run(&mut || cuda(&gguf).expect("the GPU was opened before"));
    });
    let mut state = 7u32;
    let prompt: Vec<TokenId> = (0..300)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 24
        })
        .collect();
    let run = |executor| Runner { executor }.prompt(&prompt, 1);
    let (got, want) = (run(cuda(&gguf)?)?, run(cpu(&gguf)?)?);
    let want: Vec<f64> = want.0.iter().map(|l| l.logprob.into()).collect();
    let error = mean_difference(&got.0, &want);
    let passed = suite.is_ok() && error <= 0.05;
    println!(
        "{} {architecture} in {weights}, {value_weights}: conformance {}, mean |Δ prompt logprob| {error:.5}",
        verdict(passed),
        if suite.is_ok() { "passed" } else { "FAILED" },
    );
    Ok(passed)
}

/// A real model against another engine's float32 outputs.
fn golden(model: &Path, golden: &Path) -> Result<bool> {
    let golden: Value = serde_json::from_slice(&std::fs::read(golden)?)?;
    let gguf = Gguf::open(model)?;
    let start = Instant::now();
    let mut runner = Runner {
        executor: cuda(&gguf)?,
    };
    let loaded = start.elapsed();
    let (mut sum, mut positions, mut same, mut best) = (0.0, 0, 0, 0);
    for case in golden["cases"].as_array().context("cases")? {
        let prompt = case["prompt_tokens"].as_array().context("prompt_tokens")?;
        let prompt: Vec<TokenId> = prompt
            .iter()
            .flat_map(|v| v.as_u64())
            .map(|v| v as u32)
            .collect();
        let logprobs = case["prompt_logprobs"]
            .as_array()
            .context("prompt_logprobs")?;
        let want: Vec<f64> = logprobs[1..].iter().flat_map(|v| v.as_f64()).collect();
        let greedy = case["greedy"].as_array().context("greedy")?;
        let (got, output) = runner.prompt(&prompt, greedy.len().max(1))?;
        sum += mean_difference(&got, &want) * want.len() as f64;
        positions += want.len();
        let wanted = greedy.iter().map(|step| step["token"].as_u64());
        same += wanted
            .zip(&output)
            .take_while(|(want, got)| *want == Some(u64::from(**got)))
            .count();
        best += greedy.len();
    }
    let mean = sum / positions as f64;
    let passed = mean <= 0.05;
    println!(
        "{} {}: loaded in {loaded:.1?}, mean |Δ prompt logprob| {mean:.5} over {positions} positions, {same} of {best} greedy tokens before the first difference",
        verdict(passed),
        model.display(),
    );
    Ok(passed)
}

fn verdict(passed: bool) -> &'static str {
    if passed { "ok  " } else { "FAIL" }
}

fn mean_difference(got: &[Logprobs], want: &[f64]) -> f64 {
    let pairs = got.iter().zip(want);
    let sum: f64 = pairs
        .map(|(got, want)| (f64::from(got.logprob) - want).abs())
        .sum();
    if got.len() == want.len() {
        sum / want.len().max(1) as f64
    } else {
        f64::INFINITY
    }
}

/// Runs one sequence at a time.
struct Runner {
    executor: Box<dyn Executor>,
}

impl Runner {
    /// Logprobs of the prompt from its second token on, and `output` greedy tokens.
    fn prompt(
        &mut self,
        prompt: &[TokenId],
        output: usize,
    ) -> Result<(Vec<Logprobs>, Vec<TokenId>)> {
        let sampling = SamplingParams {
            prompt_logprobs: Some(1),
            ..SamplingParams::default()
        };
        let mut bind = Some(Bind {
            prompt: prompt.into(),
            sampling: Arc::new(sampling),
            seed: 1,
        });
        let positions = (prompt.len() + output) as u32;
        let blocks = Arc::new(
            (0..positions.div_ceil(BLOCK))
                .map(BlockId)
                .collect::<Vec<_>>(),
        );
        // One sequence alone keeps all its blocks, where layers with a window have a pool of their own.
        let local = match self.executor.capacity().local {
            Some(_) => LocalBlocks {
                first: 0,
                blocks: blocks.clone(),
            },
            None => LocalBlocks::default(),
        };
        let (mut logprobs, mut tokens, mut start) = (Vec::new(), Vec::new(), 0);
        while tokens.len() < output {
            let input = match prompt.get(start as usize..) {
                Some(rest) if !rest.is_empty() => {
                    Input::Tokens(rest[..rest.len().min(100)].to_vec())
                }
                _ => Input::Last,
            };
            let row = Row {
                slot: Slot(0),
                bind: bind.take(),
                start,
                blocks: blocks.clone(),
                local: local.clone(),
                sample: start as usize + input.len() >= prompt.len(),
                prompt_logprobs: input != Input::Last,
                input,
            };
            start = row.end();
            let mut done = self.step(row)?;
            ensure!(!done.failed, "the row failed");
            logprobs.append(&mut done.prompt_logprobs);
            tokens.extend(done.sampled.map(|sampled| sampled.token));
        }
        self.executor.release(Slot(0));
        Ok((logprobs, tokens))
    }

    fn step(&mut self, row: Row) -> Result<RowOutput> {
        let batch = Batch {
            copies: Vec::new(),
            local_copies: Vec::new(),
            rows: vec![row],
        };
        self.executor.submit(Lane::Main, batch)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        let done = self.executor.wait(deadline)?.context("the step hangs")?;
        done.outputs.into_iter().next().context("no output")
    }
}
