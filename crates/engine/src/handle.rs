use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use spate_executor::Capacity;
use spate_scheduler::{AddError, Scheduler, Stats};
use spate_types::{GenerationRequest, Micros, RequestId};

use crate::EngineConfig;
use crate::shared::{Command, Shared};
use crate::stream::{StreamState, TokenStream};

/// The way to the engine, cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

/// A place for `n` sequences, taken before a request costs anything and given back when it is done.
pub struct Permit {
    shared: Arc<Shared>,
    n: u32,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.release(self.n);
    }
}

/// Why a request can't come in now; trying again later may help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// As many sequences are waiting as may.
    #[error("the queue is full ({live} sequences are running or waiting, {limit} may)")]
    QueueFull {
        /// Sequences in the engine.
        live: u32,
        /// Sequences that may be.
        limit: u32,
    },
    /// The process is shutting down.
    #[error("the server is draining before it stops")]
    Draining,
    /// The engine has failed.
    #[error("the engine has failed: {0}")]
    Dead(String),
}

/// Why a request was refused for good.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// It can never run.
    #[error(transparent)]
    Invalid(#[from] AddError),
    /// The engine has failed.
    #[error("the engine has failed: {0}")]
    Dead(String),
}

/// Whether the engine makes progress.
#[derive(Debug, Clone, PartialEq)]
pub enum Health {
    /// It does, or has nothing to do.
    Ok,
    /// A step has been running for longer than the step timeout.
    Stalled {
        /// Since when.
        seconds: f64,
    },
    /// It has failed and will not come back.
    Dead(String),
}

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// What the executor can hold.
    pub fn capacity(&self) -> &Capacity {
        &self.shared.capacity
    }

    /// What the engine was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// The engine's clock: a request's deadline is `now()` plus its time limit.
    pub fn now(&self) -> Micros {
        self.shared.now()
    }

    /// A fresh request id.
    pub fn next_id(&self) -> RequestId {
        RequestId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Gauges and counters after the last step.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Takes a place for `n` sequences. Ask before tokenizing: a full queue must cost nothing.
    ///
    /// # Errors
    /// The queue is full, the process is draining, or the engine has failed.
    pub fn admit(&self, n: u32) -> Result<Permit, AdmitError> {
        if let Some(reason) = self.shared.death() {
            return Err(AdmitError::Dead(reason));
        }
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(AdmitError::Draining);
        }
        let limit = self.shared.config.scheduler.max_live();
        let take = |live: u32| live.checked_add(n).filter(|&sum| sum <= limit);
        match self
            .shared
            .live
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
        {
            Ok(_) => Ok(Permit {
                shared: self.shared.clone(),
                n,
            }),
            Err(live) => Err(AdmitError::QueueFull { live, limit }),
        }
    }

    /// Hands a request to the engine. Everything it names by index is checked here again, whoever
    /// made it.
    ///
    /// # Errors
    /// The request can never run, or the engine has failed.
    pub fn submit(
        &self,
        permit: Permit,
        request: GenerationRequest,
    ) -> Result<TokenStream, SubmitError> {
        Scheduler::validate(
            &self.shared.config.scheduler,
            &self.shared.capacity,
            &request,
        )?;
        if request.n > permit.n {
            return Err(AddError::Invalid("n is larger than what was admitted").into());
        }
        let id = request.id;
        let state = Arc::new(StreamState::new(id, request.n, permit));
        match self.shared.streams().entry(id) {
            Entry::Occupied(_) => return Err(AddError::Invalid("the request id is in use").into()),
            Entry::Vacant(place) => place.insert(state.clone()),
        };
        let sent = self.shared.send(Command::Add(request));
        // Looked at after the insertion: a death that comes later finds the stream and ends it.
        match self.shared.death() {
            None if sent => Ok(TokenStream::new(state, self.shared.clone())),
            death => {
                self.shared.streams().remove(&id);
                Err(SubmitError::Dead(
                    death.unwrap_or_else(|| "it was shut down".into()),
                ))
            }
        }
    }

    /// Whether steps finish when they should.
    pub fn health(&self) -> Health {
        if let Some(reason) = self.shared.death() {
            return Health::Dead(reason);
        }
        match self.shared.silence() {
            Some(silence) if silence > self.shared.config.step_timeout => Health::Stalled {
                seconds: silence.as_secs_f64(),
            },
            _ => Health::Ok,
        }
    }

    /// Refuses new requests from now on; those admitted go on.
    pub fn begin_drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// Resolves when no admitted request is left.
    pub async fn idle(&self) {
        loop {
            let woken = self.shared.idle.notified();
            if self.shared.live.load(Ordering::Acquire) == 0 {
                return;
            }
            woken.await;
        }
    }

    /// Ends the engine thread; what still runs is aborted.
    pub fn shutdown(&self) {
        self.begin_drain();
        self.shared.send(Command::Shutdown);
    }

    /// Resolves with the reason once the engine has failed.
    pub async fn dead(&self) -> String {
        let mut dead = self.shared.dead();
        match dead.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            // The sender lives in `shared`, which `self` holds.
            Err(_) => std::future::pending().await,
        }
    }
}
