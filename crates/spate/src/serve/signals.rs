//! SIGTERM and SIGINT: the first asks for an orderly end, the second ends the process now.

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Listens from its installation on; signals that come before anyone waits are not lost.
pub(crate) struct Signals {
    seen: watch::Receiver<bool>,
}

impl Signals {
    /// Takes both signals over for the rest of the process.
    pub(crate) fn install() -> Result<Self> {
        let failed = "can't listen for signals";
        let mut terminate = signal(SignalKind::terminate()).context(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).context(failed)?;
        let (sender, seen) = watch::channel(false);
        tokio::spawn(async move {
            next(&mut terminate, &mut interrupt).await;
            sender.send_replace(true);
            let number = next(&mut terminate, &mut interrupt).await;
            // What a shell reports for a process that the signal killed.
            std::process::exit(128 + number);
        });
        Ok(Self { seen })
    }

    /// Resolves once the first has come.
    pub(crate) async fn first(&mut self) {
        // The sender lives in a task that never ends before the process does.
        let _seen = self.seen.wait_for(|seen| *seen).await;
    }
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> i32 {
    tokio::select! {
        _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
        _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
    }
}
