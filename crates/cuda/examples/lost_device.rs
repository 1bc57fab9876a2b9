//! What happens when a GPU is lost under a running engine: `lost_device`. A kernel is made to write
//! memory that is not there, so the context is lost for good; then every stream must end with an error
//! and the engine be dead within a second. Without a GPU it says so and passes.

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/failure.rs"]
mod failure;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use half::bf16;
use spate_cuda::driver::{Arena, Device, Priority, Stream};
use spate_cuda::kernels::ActMul;
use spate_model::Activation;

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
    let executor = common::Options::default().cuda(&failure::model()?, &common::config())?;
    let engine = failure::start(executor, Duration::from_secs(60))?;
    let streams = failure::streams(&engine).await?;
    poison(device)?;
    let noticed = failure::noticed(&engine, Instant::now(), streams).await?;
    println!("ok   lost device: {noticed}");
    Ok(())
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
