//! What happens when a kernel hangs under a running engine: `hung_kernel`. A step's kernel waits for masks that
//! nobody sends; when the step's deadline has passed, every stream must end with an error and the engine be dead
//! within a second, and the process must end although the kernel still runs. So all that happens in a process of its
//! own. Without a GPU it says so and passes.

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/failure.rs"]
mod failure;

use std::io::{BufRead, BufReader};
use std::mem::ManuallyDrop;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use spate_cuda::driver::Device;
use spate_executor::{
    Batch, Capacity, Completion, Executor, ExecutorError, Lane, Ticket, TokenMask,
};
use spate_types::Slot;

/// The longest that a step may take.
const DEADLINE: Duration = Duration::from_millis(500);

/// For the process to end after it has said what happened.
const LIMIT: Duration = Duration::from_secs(1);

/// For the process to begin.
const LOADING: Duration = Duration::from_secs(20);

/// The argument of the process that hangs.
const HANG: &str = "hang";

fn main() -> Result<ExitCode> {
    let Some(device) = device::first()? else {
        return Ok(ExitCode::SUCCESS);
    };
    if std::env::args().nth(1).as_deref() == Some(HANG) {
        let runtime = tokio::runtime::Runtime::new()?;
        let happened = runtime.block_on(hang(device))?;
        println!("ok   hung kernel: {happened}");
        // As the daemon ends when its engine has failed.
        runtime.shutdown_background();
        return Ok(ExitCode::FAILURE);
    }
    drop(device);
    let program = std::env::current_exe()?;
    let mut child = Command::new(program)
        .arg(HANG)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("its output is piped")?);
    let reader = thread::spawn(move || {
        let mut said = String::new();
        let read = output.read_line(&mut said);
        read.map(|_| (said, Instant::now()))
    });
    let until = Instant::now() + LOADING + DEADLINE + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            bail!("the process with the hung kernel does not end");
        }
        thread::sleep(Duration::from_millis(1));
    };
    let ended = Instant::now();
    let (said, at) = reader.join().expect("reading doesn't panic")?;
    let after = ended.saturating_duration_since(at);
    print!("{said}");
    ensure!(
        status.code() == Some(1) && !said.is_empty(),
        "it ended with {status}"
    );
    ensure!(after <= LIMIT, "the process took {after:?} to end");
    println!("ok   hung kernel: the process ended {after:.1?} later with {status}");
    Ok(ExitCode::SUCCESS)
}

async fn hang(device: Device) -> Result<String> {
    let hangs = Arc::new(AtomicBool::new(false));
    let options = common::Options::default();
    let executor = Hanging {
        inner: ManuallyDrop::new(options.cuda(&failure::model()?, &common::config())?),
        hangs: Arc::clone(&hangs),
        device,
    };
    let engine = failure::start(Box::new(executor), DEADLINE)?;
    let streams = failure::streams(&engine).await?;
    hangs.store(true, Ordering::Release);
    let hung = Instant::now();
    // Nothing may be wrong before the deadline.
    tokio::time::sleep(DEADLINE.saturating_sub(Duration::from_millis(50))).await;
    ensure!(
        engine.health() == spate_engine::Health::Ok,
        "{:?} before the deadline",
        engine.health()
    );
    failure::noticed(&engine, hung + DEADLINE, streams)
        .await
        .context("after the deadline")
}

/// The GPU, whose steps hang from some time on: their samplers wait for masks that nobody gives them.
struct Hanging {
    /// Never dropped: that would give the masks.
    inner: ManuallyDrop<Box<dyn Executor>>,
    hangs: Arc<AtomicBool>,
    device: Device,
}

impl Executor for Hanging {
    fn capacity(&self) -> &Capacity {
        self.inner.capacity()
    }

    fn submit(&mut self, lane: Lane, mut batch: Batch) -> Result<Ticket, ExecutorError> {
        let hangs = self.hangs.load(Ordering::Acquire);
        for row in &mut batch.rows {
            row.masked |= hangs && row.sample;
        }
        self.inner.submit(lane, batch)
    }

    fn mask(&mut self, ticket: Ticket, masks: Vec<TokenMask>) -> Result<(), ExecutorError> {
        self.inner.mask(ticket, masks)
    }

    fn wait(&mut self, deadline: Instant) -> Result<Option<Completion>, ExecutorError> {
        self.inner.wait(deadline)
    }

    fn release(&mut self, slot: Slot) {
        self.inner.release(slot);
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        // As the executor's own memory, which the driver frees when all kernels have ended: the engine's thread
        // hangs here.
        let _ = self.device.synchronize();
    }
}
