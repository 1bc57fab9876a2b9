//! One thread that runs the serving loop: requests in, tokens out.
//!
//! Three queue crossings, each once: a request enters the inbox ([`EngineHandle::submit`]), the
//! engine thread sends one message per *step* to the fan-out task, and the fan-out task appends to
//! each [`TokenStream`]. Nothing that a client does can make the engine thread wait: a reader that
//! lags finds its events coalesced, and one that lags too far loses its request.

mod fanout;
mod handle;
mod run;
mod shared;
mod stream;

pub use handle::{AdmitError, EngineHandle, Health, Permit, SubmitError};
pub use shared::StepReport;
pub use spate_scheduler::{AddError, Event, SchedulerConfig, Stats};
pub use stream::TokenStream;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use spate_executor::Executor;
use spate_scheduler::Scheduler;

use crate::fanout::FanOut;
use crate::run::Runner;
use crate::shared::Shared;

/// What the engine is told at its start.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Limits and policy of the scheduler.
    pub scheduler: SchedulerConfig,
    /// A step that takes longer has hung: the engine gives up, and the process should restart.
    pub step_timeout: Duration,
}

/// Starts the engine thread and the fan-out task that feeds the streams.
///
/// `observer` sees each step's report, in order, on the fan-out task: it must not block.
///
/// # Errors
/// When the operating system refuses a thread.
///
/// # Panics
/// Outside a tokio runtime.
pub fn start(
    executor: Box<dyn Executor>,
    config: EngineConfig,
    observer: impl FnMut(&StepReport) + Send + 'static,
) -> std::io::Result<EngineHandle> {
    let capacity = executor.capacity().clone();
    let scheduler = Scheduler::new(config.scheduler.clone(), capacity.clone());
    let (inbox, commands) = mpsc::channel();
    let (outbox, messages) = tokio::sync::mpsc::unbounded_channel();
    let shared = Arc::new(Shared::new(config, capacity, inbox));

    let runner = Runner::new(executor, scheduler, shared.clone(), commands, outbox);
    std::thread::Builder::new()
        .name("spate-engine".into())
        .spawn(move || runner.run_to_end())?;
    tokio::spawn(FanOut::new(shared.clone(), observer).run(messages));
    Ok(EngineHandle::new(shared))
}
