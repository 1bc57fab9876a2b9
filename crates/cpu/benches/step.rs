//! Whole steps of a real model: load time, prompt and decode speed, memory.
//!
//! `SPATE_TEST_MODEL=model.gguf cargo bench -p spate-cpu --bench step [-- exact] [f32|f16|bf16|int8]`
//! (the latter for the KV cache).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spate_cpu::{CpuConfig, CpuExecutor, CpuMode, KvDtype};
use spate_executor::{Batch, Bind, Capacity, Executor, Input, Lane, Row};
use spate_model::Gguf;
use spate_types::{BlockId, LocalBlocks, SamplingParams, Slot};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Each figure is the best of as many runs: others on the machine only ever add time.
const RUNS: usize = 12;
const DECODES: u32 = 16;

fn main() -> Result<()> {
    let Some(model) = std::env::var_os("SPATE_TEST_MODEL") else {
        println!("set SPATE_TEST_MODEL to a GGUF file");
        return Ok(());
    };
    let mode = match std::env::args().any(|arg| arg == "exact") {
        true => CpuMode::Exact,
        false => CpuMode::Fast,
    };
    let start = Instant::now();
    let gguf = Gguf::open(Path::new(&model))?;
    println!("header        {:8.1} ms", millis(start.elapsed()));
    let config = CpuConfig {
        mode,
        threads: 0,
        block_size: 32,
        kv_cache_bytes: 512 << 20,
        kv_dtype: std::env::args().find_map(|arg| kv_dtype(&arg)),
        max_seq_len: 0,
        slots: 64,
        max_batch_tokens: 512,
    };
    let start = Instant::now();
    let mut executor = CpuExecutor::load(&gguf, &config, &mut |_| {})?;
    println!("load          {:8.1} ms", millis(start.elapsed()));
    println!("resident      {:8.1} MB", memory("VmRSS:")? / 1e6);
    for (what, bytes) in executor.memory_budget() {
        println!("{what:13} {:8.1} MB", bytes as f64 / 1e6);
    }
    println!("{mode:?}, {}", executor.simd());
    for len in [16, 128, 512] {
        let time = best(|| prompts(&mut executor, 1, len))?;
        let speed = f64::from(len) / time.as_secs_f64();
        println!(
            "prompt {len:6} {:8.1} ms {speed:8.1} tokens/s",
            millis(time)
        );
    }
    for (sequences, context) in [(1, 16), (1, 480), (8, 16), (8, 480)] {
        prompts(&mut executor, sequences, context)?;
        let mut position = context;
        let time = best(|| {
            let time = decodes(&mut executor, sequences, position);
            position += DECODES;
            time
        })? / DECODES;
        let speed = f64::from(sequences) / time.as_secs_f64();
        println!(
            "decode {sequences} at {context:4} {:6.2} ms a step {speed:8.1} tokens/s",
            millis(time)
        );
    }
    println!("resident      {:8.1} MB", memory("VmRSS:")? / 1e6);
    println!("at most       {:8.1} MB", memory("VmHWM:")? / 1e6);
    Ok(())
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn best(mut run: impl FnMut() -> Result<Duration>) -> Result<Duration> {
    let mut times = (0..RUNS).map(|_| run()).collect::<Result<Vec<_>>>()?;
    times.sort();
    Ok(times[0])
}

fn row(capacity: &Capacity, slot: u32, start: u32, input: Input) -> Row {
    let prompt = match &input {
        Input::Tokens(tokens) => Some(Arc::from(tokens.as_slice())),
        Input::Last => None,
    };
    let blocks = slot * 32..(slot + 1) * 32;
    Row {
        slot: Slot(slot),
        bind: prompt.map(|prompt| Bind {
            prompt,
            sampling: Arc::new(SamplingParams::default()),
            seed: 0,
        }),
        start,
        input,
        // Room for 1024 positions each.
        blocks: Arc::new(blocks.clone().map(BlockId).collect()),
        local: capacity.local.map_or_else(LocalBlocks::default, |local| {
            let first = local.first_seen(start, capacity.block_size);
            let seen = blocks.skip(first as usize).map(BlockId);
            LocalBlocks {
                first,
                blocks: Arc::new(seen.collect()),
            }
        }),
        sample: true,
        masked: false,
        prompt_logprobs: false,
    }
}

fn step(executor: &mut CpuExecutor, rows: Vec<Row>) -> Result<Duration> {
    executor.submit(
        Lane::Main,
        Batch {
            rows,
            ..Batch::default()
        },
    )?;
    let done = executor.wait(Instant::now() + Duration::from_secs(600))?;
    Ok(done.ok_or("a step takes too long")?.busy)
}

/// Prompts of `len` tokens for some slots, one after another.
fn prompts(executor: &mut CpuExecutor, slots: u32, len: u32) -> Result<Duration> {
    let tokens = |slot: u32| {
        (0..len)
            .map(|i| (i * 97 + slot * 31 + 5) % 40_000)
            .collect()
    };
    let mut time = Duration::ZERO;
    for slot in 0..slots {
        time += step(
            executor,
            vec![row(
                executor.capacity(),
                slot,
                0,
                Input::Tokens(tokens(slot)),
            )],
        )?;
    }
    Ok(time)
}

fn decodes(executor: &mut CpuExecutor, slots: u32, position: u32) -> Result<Duration> {
    let mut time = Duration::ZERO;
    for i in 0..DECODES {
        let rows = (0..slots).map(|slot| row(executor.capacity(), slot, position + i, Input::Last));
        time += step(executor, rows.collect())?;
    }
    Ok(time)
}

fn kv_dtype(name: &str) -> Option<KvDtype> {
    match name {
        "f32" => Some(KvDtype::F32),
        "f16" => Some(KvDtype::F16),
        "bf16" => Some(KvDtype::Bf16),
        "int8" => Some(KvDtype::Int8),
        _ => None,
    }
}

/// A field of the process's status, in bytes (Linux).
fn memory(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib: f64 = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .ok_or("no such field")?
        .parse()?;
    Ok(kib * 1024.0)
}
