//! Streams that decode together, for comparison with other engines: one line of JSON.
//!
//! `cargo bench -p spate-cpu --bench streams -- MODEL [--threads N] [--streams N] [--prompt N]
//! [--output N] [--runs N] [--kv f32|f16|bf16|int8]`. A run computes the prompt of each stream, then
//! decodes all streams in step; the KV cache is as large as they need.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spate_cpu::{CpuConfig, CpuExecutor, CpuMode, Estimate, KvDtype};
use spate_executor::{Batch, Bind, Executor, Input, Lane, Row};
use spate_model::Gguf;
use spate_types::{BlockId, LocalBlocks, SamplingParams, Slot, TokenId};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const BLOCK: u32 = 32;

struct Options {
    model: PathBuf,
    threads: usize,
    streams: u32,
    prompt: u32,
    output: u32,
    runs: u32,
    kv: Option<KvDtype>,
}

fn main() -> Result<()> {
    let Some(options) = Options::parse()? else {
        println!("which model? `-- model.gguf`");
        return Ok(());
    };
    let start = Instant::now();
    let gguf = Gguf::open(&options.model)?;
    let blocks = (options.prompt + options.output).div_ceil(BLOCK);
    let mut config = CpuConfig {
        mode: CpuMode::Fast,
        threads: options.threads,
        block_size: BLOCK,
        kv_cache_bytes: 0,
        kv_dtype: options.kv,
        max_seq_len: 0,
        slots: options.streams,
        max_batch_tokens: options.prompt.max(options.streams),
    };
    let estimate = Estimate::new(&gguf, &config)?;
    // Nothing is given up behind a window here: that takes more than so many sequences need.
    for streams in options.streams.. {
        let kv = estimate.kv_cache(streams, options.prompt + options.output)?;
        config.kv_cache_bytes = kv.bytes;
        if kv
            .local
            .is_none_or(|(local, _)| local >= options.streams * blocks)
        {
            break;
        }
    }
    let mut bench = Bench {
        executor: CpuExecutor::load(&gguf, &config, &mut |_| {})?,
        blocks,
        prompt: prompt(options.prompt),
    };
    let load = start.elapsed().as_secs_f64();
    let (mut prompts, mut decodes) = (Vec::new(), Vec::new());
    for _ in 0..options.runs {
        let (prompt, decode) = bench.run(&options)?;
        prompts.push(f64::from(options.prompt * options.streams) / prompt.as_secs_f64());
        // The first token of the output comes out of the prompt's step.
        decodes.push(f64::from((options.output - 1) * options.streams) / decode.as_secs_f64());
    }
    println!(
        "{{\"simd\": \"{}\", \"load_s\": {load:.3}, \"prompt_tok_s\": {prompts:.1?}, \
         \"decode_tok_s\": {decodes:.2?}, \"peak_mb\": {:.1}}}",
        bench.executor.simd(),
        peak_memory()? / 1e6
    );
    Ok(())
}

impl Options {
    fn parse() -> Result<Option<Self>> {
        let mut options = Self {
            model: PathBuf::new(),
            threads: 0,
            streams: 1,
            prompt: 512,
            output: 128,
            runs: 3,
            kv: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            if !arg.starts_with("--") {
                options.model = arg.into();
                continue;
            }
            if arg == "--bench" {
                continue; // cargo's own
            }
            let value = args.next().ok_or("a flag without its value")?;
            match arg.as_str() {
                "--threads" => options.threads = value.parse()?,
                "--streams" => options.streams = value.parse()?,
                "--prompt" => options.prompt = value.parse()?,
                "--output" => options.output = value.parse()?,
                "--runs" => options.runs = value.parse()?,
                "--kv" => options.kv = Some(kv_dtype(&value)?),
                _ => return Err(format!("there is no {arg}").into()),
            }
        }
        Ok((options.model.is_file()).then_some(options))
    }
}

fn kv_dtype(name: &str) -> Result<KvDtype> {
    Ok(match name {
        "f32" => KvDtype::F32,
        "f16" => KvDtype::F16,
        "bf16" => KvDtype::Bf16,
        "int8" => KvDtype::Int8,
        _ => return Err(format!("no such KV type: {name}").into()),
    })
}

/// The same tokens as `compare/llama_cpp.py` has.
fn prompt(len: u32) -> Arc<[TokenId]> {
    (0..len).map(|i| (i * 97 + 5) % 40_000).collect()
}

struct Bench {
    executor: CpuExecutor,
    /// Of each stream.
    blocks: u32,
    prompt: Arc<[TokenId]>,
}

impl Bench {
    /// Time of all prompts, and of all decodes.
    fn run(&mut self, options: &Options) -> Result<(Duration, Duration)> {
        let (mut prompts, mut decodes) = (Duration::ZERO, Duration::ZERO);
        for slot in 0..options.streams {
            let row = self.row(slot, 0, Input::Tokens(self.prompt.to_vec()));
            prompts += self.step(vec![row])?;
        }
        for position in options.prompt..options.prompt + options.output - 1 {
            let row = |slot| self.row(slot, position, Input::Last);
            let rows = (0..options.streams).map(row).collect();
            decodes += self.step(rows)?;
        }
        Ok((prompts, decodes))
    }

    fn row(&self, slot: u32, start: u32, input: Input) -> Row {
        let blocks = slot * self.blocks..(slot + 1) * self.blocks;
        let local = self.executor.capacity().local.map(|local| {
            let first = local.first_seen(start, BLOCK);
            let seen = blocks.clone().skip(first as usize).map(BlockId);
            LocalBlocks {
                first,
                blocks: Arc::new(seen.collect()),
            }
        });
        Row {
            slot: Slot(slot),
            bind: (start == 0).then(|| Bind {
                prompt: self.prompt.clone(),
                sampling: Arc::new(SamplingParams::default()),
                seed: 0,
            }),
            start,
            input,
            blocks: Arc::new(blocks.map(BlockId).collect()),
            local: local.unwrap_or_default(),
            sample: true,
            masked: false,
            prompt_logprobs: false,
        }
    }

    fn step(&mut self, rows: Vec<Row>) -> Result<Duration> {
        let start = Instant::now();
        self.executor.submit(
            Lane::Main,
            Batch {
                rows,
                ..Batch::default()
            },
        )?;
        let done = self.executor.wait(start + Duration::from_secs(600))?;
        done.ok_or("a step takes too long")?;
        Ok(start.elapsed())
    }
}

/// Most memory that was resident at once, in bytes (Linux).
fn peak_memory() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: f64 = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .ok_or("no VmHWM")?
        .parse()?;
    Ok(kib * 1024.0)
}
