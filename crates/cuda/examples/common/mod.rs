//! What the test programs share: executors, and sequences that run on them without an engine.
#![allow(dead_code)] // each program uses its part

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use spate_cpu::{CpuConfig, CpuExecutor, CpuMode};
use spate_cuda::{CudaConfig, CudaError, CudaExecutor, KvDtype, Overlap};
use spate_executor::{Batch, Bind, Executor, Input, Lane, Row};
use spate_model::Checkpoint;
use spate_types::{BlockId, BlockIds, LocalBlocks, Logprobs, SamplingParams, Slot, TokenId};

/// Tokens in a KV block.
pub(crate) const BLOCK: u32 = 16;

/// Sequences that can be alive at once.
pub(crate) const SLOTS: u32 = 16;

/// Most input tokens in one step: prompts come in chunks.
pub(crate) const CHUNK: u32 = 100;

/// Small steps, so that prompts come in chunks, and a small cache.
pub(crate) fn config() -> CudaConfig {
    CudaConfig {
        device: 0,
        block_size: BLOCK,
        kv_cache_bytes: Some(256 << 20),
        kv_dtype: KvDtype::Bf16,
        memory_utilization: 0.9,
        max_seq_len: 0,
        slots: SLOTS,
        max_batch_tokens: 512,
        overlap: Overlap::Off,
        graphs: true,
    }
}

/// What oracle and golden can be asked for, before other arguments.
#[derive(Default)]
pub(crate) struct Options {
    /// `--portable`: with the kernels that run on every GPU.
    pub(crate) portable: bool,
    /// `--kv-dtype bf16|int8|fp8`.
    pub(crate) kv_dtype: Option<KvDtype>,
}

impl Options {
    /// Takes what it knows from the arguments.
    pub(crate) fn take(args: &mut Vec<String>) -> Result<Self> {
        let mut options = Self::default();
        if let Some(at) = args.iter().position(|arg| arg == "--portable") {
            args.remove(at);
            options.portable = true;
        }
        if let Some(at) = args.iter().position(|arg| arg == "--kv-dtype") {
            options.kv_dtype = Some(match args.get(at + 1).map(String::as_str) {
                Some("bf16") => KvDtype::Bf16,
                Some("int8") => KvDtype::Int8,
                Some("fp8") => KvDtype::Fp8,
                _ => bail!("--kv-dtype is bf16, int8 or fp8"),
            });
            args.drain(at..at + 2);
        }
        Ok(options)
    }

    /// What results are titled with.
    pub(crate) fn path(&self) -> &'static str {
        if self.portable {
            ", portable kernels"
        } else {
            ""
        }
    }

    pub(crate) fn cuda(
        &self,
        model: &dyn Checkpoint,
        config: &CudaConfig,
    ) -> Result<Box<dyn Executor>, CudaError> {
        let progress = &mut |_| {};
        Ok(Box::new(match self.portable {
            true => CudaExecutor::load_portable(model, config, progress)?,
            false => CudaExecutor::load(model, config, progress)?,
        }))
    }
}

/// The CPU in float32: the oracle.
pub(crate) fn cpu(model: &dyn Checkpoint) -> Result<Box<dyn Executor>> {
    let config = CpuConfig {
        mode: CpuMode::Exact,
        threads: 0,
        block_size: BLOCK,
        kv_cache_bytes: 1 << 30,
        max_seq_len: 0,
        slots: SLOTS,
        max_batch_tokens: 512,
        kv_dtype: None,
    };
    Ok(Box::new(CpuExecutor::load(model, &config, &mut |_| {})?))
}

/// What a sequence gave.
#[derive(Debug, Default)]
pub(crate) struct Output {
    /// Of the prompt, from its second token on, each with the best token at its place.
    pub(crate) prompt: Vec<Logprobs>,
    pub(crate) tokens: Vec<TokenId>,
}

/// A sequence under way.
struct Sequence {
    slot: Slot,
    prompt: Arc<[TokenId]>,
    blocks: BlockIds,
    /// Next input position.
    position: u32,
    output: Output,
}

/// Runs each prompt in chunks and then all decodes together, `tokens` greedy ones. At most [`SLOTS`]
/// prompts.
pub(crate) fn run(
    executor: &mut dyn Executor,
    prompts: &[Vec<TokenId>],
    tokens: usize,
) -> Result<Vec<Output>> {
    let mut next_block = 0;
    let mut sequences = Vec::new();
    for (slot, prompt) in prompts.iter().enumerate() {
        let count = (prompt.len() + tokens).div_ceil(BLOCK as usize) as u32;
        let blocks: Vec<BlockId> = (next_block..next_block + count).map(BlockId).collect();
        next_block += count;
        let mut sequence = Sequence {
            slot: Slot(slot as u32),
            prompt: prompt.as_slice().into(),
            blocks: Arc::new(blocks),
            position: 0,
            output: Output::default(),
        };
        while sequence.output.tokens.is_empty() {
            step(executor, &mut [&mut sequence])?;
        }
        sequences.push(sequence);
    }
    for _ in 1..tokens {
        step(executor, &mut sequences.iter_mut().collect::<Vec<_>>())?;
    }
    for sequence in &sequences {
        executor.release(sequence.slot);
    }
    Ok(sequences.into_iter().map(|s| s.output).collect())
}

fn step(executor: &mut dyn Executor, sequences: &mut [&mut Sequence]) -> Result<()> {
    let has_local = executor.capacity().local.is_some();
    let rows: Vec<Row> = sequences.iter().map(|s| s.row(has_local)).collect();
    let ends: Vec<u32> = rows.iter().map(Row::end).collect();
    let batch = Batch {
        copies: Vec::new(),
        local_copies: Vec::new(),
        rows,
    };
    executor.submit(Lane::Main, batch)?;
    let done = executor.wait(Instant::now() + Duration::from_secs(60))?;
    let outputs = done.context("the step hangs")?.outputs;
    for ((sequence, output), end) in sequences.iter_mut().zip(outputs).zip(ends) {
        ensure!(!output.failed, "the row of slot {} failed", sequence.slot.0);
        sequence.position = end;
        sequence.output.prompt.extend(output.prompt_logprobs);
        let sampled = output.sampled.map(|sampled| sampled.token);
        sequence.output.tokens.extend(sampled);
    }
    Ok(())
}

impl Sequence {
    fn row(&self, has_local: bool) -> Row {
        let rest = &self.prompt[(self.position as usize).min(self.prompt.len())..];
        let input = match rest.len() {
            0 => Input::Last,
            n => Input::Tokens(rest[..n.min(CHUNK as usize)].to_vec()),
        };
        let bind = (self.position == 0).then(|| Bind {
            prompt: self.prompt.clone(),
            sampling: Arc::new(SamplingParams {
                prompt_logprobs: Some(1),
                ..SamplingParams::default()
            }),
            seed: 1,
        });
        // Where layers with a window have a pool of their own, a sequence keeps all its blocks there.
        let local = match has_local {
            true => LocalBlocks {
                first: 0,
                blocks: self.blocks.clone(),
            },
            false => LocalBlocks::default(),
        };
        Row {
            slot: self.slot,
            bind,
            start: self.position,
            blocks: self.blocks.clone(),
            local,
            sample: self.position as usize + input.len() >= self.prompt.len(),
            masked: false,
            prompt_logprobs: input != Input::Last,
            input,
        }
    }
}

/// Mean |a - b| of logprobs; infinite if there are not as many of both.
pub(crate) fn mean_difference(got: &[Logprobs], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let pairs = got.iter().zip(want);
    let apart = pairs.map(|(got, want)| (f64::from(got.logprob) - want).abs());
    apart.sum::<f64>() / want.len().max(1) as f64
}

pub(crate) fn verdict(passed: bool) -> &'static str {
    if passed { "ok  " } else { "FAIL" }
}
