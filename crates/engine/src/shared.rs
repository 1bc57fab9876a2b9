use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use spate_executor::{Capacity, Lane};
use spate_scheduler::{Event, Stats};
use spate_types::{FinishReason, GenerationRequest, Micros, RequestId};
use tokio::sync::{Notify, watch};

use crate::EngineConfig;
use crate::stream::StreamState;

/// How much longer than a step may take the engine thread may be silent: it finds hung steps itself.
const GRACE: Duration = Duration::from_secs(1);

/// What the engine thread is asked to do.
pub(crate) enum Command {
    Add(GenerationRequest),
    Finish {
        id: RequestId,
        index: Option<u32>,
        reason: FinishReason,
    },
    Shutdown,
}

/// What the engine thread tells the fan-out task.
pub(crate) enum Message {
    Step(StepReport),
    /// The loop has ended; this is how what was still live ends.
    End(FinishReason),
}

/// What one turn of the loop did: one committed step, or only bookkeeping (an abort, a deadline).
#[derive(Debug, Clone)]
pub struct StepReport {
    /// Lane of the committed step; `None` when no step was committed.
    pub lane: Option<Lane>,
    /// Input tokens of the step.
    pub batch_tokens: u32,
    /// Sequences in the step.
    pub batch_rows: u32,
    /// Time the device worked on it.
    pub busy: Duration,
    /// On the engine's clock.
    pub now: Micros,
    /// Gauges and counters after it.
    pub stats: Stats,
    /// What happened to requests, in order.
    pub events: Vec<Event>,
}

/// What the handle, the engine thread and the fan-out task share.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) capacity: Capacity,
    pub(crate) origin: Instant,
    pub(crate) next_id: AtomicU64,
    /// Sequences admitted and not yet done, tokenizing ones included.
    pub(crate) live: AtomicU32,
    /// Woken whenever `live` falls to zero.
    pub(crate) idle: Notify,
    pub(crate) draining: AtomicBool,
    /// When the engine thread last showed progress; 0 while it is parked for want of work.
    pub(crate) heartbeat: AtomicU64,
    dead: watch::Sender<Option<String>>,
    streams: Mutex<HashMap<RequestId, Arc<StreamState>>>,
    stats: Mutex<Stats>,
    inbox: Mutex<mpsc::Sender<Command>>,
}

impl Shared {
    pub(crate) fn new(
        config: EngineConfig,
        capacity: Capacity,
        inbox: mpsc::Sender<Command>,
    ) -> Self {
        Self {
            config,
            capacity,
            origin: Instant::now(),
            next_id: AtomicU64::new(1),
            live: AtomicU32::new(0),
            idle: Notify::new(),
            draining: AtomicBool::new(false),
            heartbeat: AtomicU64::new(0),
            dead: watch::Sender::new(None),
            streams: Mutex::new(HashMap::new()),
            stats: Mutex::new(Stats::default()),
            inbox: Mutex::new(inbox),
        }
    }

    /// Microseconds since the engine started, at least 1 (0 means "never" in `Timings`).
    pub(crate) fn now(&self) -> Micros {
        (self.origin.elapsed().as_micros() as Micros).max(1)
    }

    /// `false` when the engine thread is gone.
    pub(crate) fn send(&self, command: Command) -> bool {
        lock(&self.inbox).send(command).is_ok()
    }

    pub(crate) fn streams(&self) -> MutexGuard<'_, HashMap<RequestId, Arc<StreamState>>> {
        lock(&self.streams)
    }

    pub(crate) fn stats(&self) -> Stats {
        *lock(&self.stats)
    }

    pub(crate) fn publish_stats(&self, stats: Stats) {
        *lock(&self.stats) = stats;
    }

    /// Marks the engine dead; the first reason stays.
    pub(crate) fn die(&self, reason: String) {
        self.dead.send_if_modified(|dead| {
            let first = dead.is_none();
            if first {
                *dead = Some(reason);
            }
            first
        });
    }

    pub(crate) fn dead(&self) -> watch::Receiver<Option<String>> {
        self.dead.subscribe()
    }

    pub(crate) fn death(&self) -> Option<String> {
        self.dead.borrow().clone()
    }

    /// Time since the engine thread showed progress; `None` while it has nothing to do.
    pub(crate) fn silence(&self) -> Option<Duration> {
        match self.heartbeat.load(Ordering::Acquire) {
            0 => None,
            beat => Some(Duration::from_micros(self.now().saturating_sub(beat))),
        }
    }

    /// Why the engine thread is given up, if it is stuck in a call.
    pub(crate) fn stuck(&self) -> Option<String> {
        let limit = self.config.step_timeout + GRACE;
        let silence = self.silence().filter(|silence| *silence > limit)?;
        Some(format!(
            "the engine thread has been stuck for {:.1} s: the device or its driver hangs",
            silence.as_secs_f32()
        ))
    }

    pub(crate) fn release(&self, n: u32) {
        if self.live.fetch_sub(n, Ordering::AcqRel) == n {
            self.idle.notify_waiters();
        }
    }
}

/// A poisoned lock still guards whole values here: each critical section is a few plain moves.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
