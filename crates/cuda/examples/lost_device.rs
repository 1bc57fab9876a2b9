//! What happens when a GPU is lost under a running engine: `lost_device`. A kernel is made to write
//! memory that is not there, so the context is lost for good; then every stream must end with an error
//! and the engine be dead within a second. Without a GPU it says so and passes.

mod common;
#[path = "common/device.rs"]
mod device;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use half::bf16;
use spate_cuda::driver::{Arena, Device, Priority, Stream};
use spate_cuda::kernels::ActMul;
use spate_engine::{EngineConfig, EngineHandle, Event, Health, SchedulerConfig};
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{Activation, Gguf};
use spate_types::{FinishReason, GenerationRequest, SamplingParams, StopParams};

const LIMIT: Duration = Duration::from_secs(1);

/// Streams that run when it happens.
const STREAMS: u32 = 4;

fn main() -> Result<ExitCode> {
    let Some(device) = device::first()? else {
        return Ok(ExitCode::SUCCESS);
    };
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(lose(&device))?;
    // Clean-up of a lost context has nothing to say.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

async fn lose(device: &Device) -> Result<()> {
    let engine = start()?;
    let mut streams = Vec::new();
    for i in 0..STREAMS {
        let mut stream = engine.submit(engine.admit(1)?, request(&engine, i))?;
        ensure!(stream.next().await.is_some(), "no first token");
        streams.push(stream);
    }
    poison(device)?;
    let lost = Instant::now();
    let reason = tokio::time::timeout(LIMIT, engine.dead()).await;
    let dead = lost.elapsed();
    ensure!(reason.is_ok(), "nobody noticed for {dead:?}");
    for mut stream in streams {
        let mut end = None;
        while let Some(events) = tokio::time::timeout(LIMIT, stream.next()).await? {
            for event in events {
                if let Event::Finished { reason, .. } = event {
                    end = Some(reason);
                }
            }
        }
        ensure!(
            end == Some(FinishReason::Error),
            "a stream ended with {end:?}"
        );
    }
    ensure!(
        matches!(engine.health(), Health::Dead(_)),
        "health is not red"
    );
    println!(
        "ok   lost device: noticed after {dead:.1?}, {STREAMS} streams ended with an error after {:.1?}: {}",
        lost.elapsed(),
        reason.unwrap_or_default()
    );
    Ok(())
}

fn start() -> Result<EngineHandle> {
    let file = TempFile::new(&tiny_llama(&TinyLlama {
        hidden: 128,
        head_dim: 64,
        ffn: 192,
        // Streams that last for seconds.
        context_len: 16_384,
        ..TinyLlama::default()
    }));
    let gguf = Gguf::open(file.path())?;
    let executor = common::cuda(&gguf, &common::config())?;
    let max_model_len = executor.capacity().max_seq_len;
    let config = EngineConfig {
        scheduler: SchedulerConfig {
            max_num_seqs: common::SLOTS,
            max_batch_tokens: 512,
            max_model_len,
            max_waiting: common::SLOTS,
            prefix_caching: true,
        },
        step_timeout: Duration::from_secs(60),
    };
    Ok(spate_engine::start(executor, config, |_| {})?)
}

fn request(engine: &EngineHandle, i: u32) -> GenerationRequest {
    GenerationRequest {
        id: engine.next_id(),
        prompt: [i, 2, 3].as_slice().into(),
        sampling: Arc::new(SamplingParams::default()),
        stop: Arc::new(StopParams {
            max_tokens: engine.config().scheduler.max_model_len - 3,
            ..StopParams::default()
        }),
        n: 1,
        priority: 0,
        cache_salt: None,
        deadline: None,
    }
}

/// Runs a kernel on memory that was given back.
fn poison(device: &Device) -> Result<()> {
    const TOKENS: usize = 4096;
    const WIDTH: usize = 4096;
    let kernel = ActMul::load(device)?;
    let stream = Stream::new(device, Priority::High)?;
    let mut arena = Arena::new(device, "nothing", 1 << 30)?;
    let input = arena.take::<bf16>(2 * TOKENS * WIDTH)?;
    let output = arena.take::<bf16>(TOKENS * WIDTH)?;
    drop(arena);
    // SAFETY: none; the memory is gone, and the GPU's own protection is what is tested. The process has
    // no other use for this context afterwards.
    unsafe { kernel.launch(&stream, Activation::Silu, TOKENS, WIDTH, input, output)? };
    Ok(())
}
