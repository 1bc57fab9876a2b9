use std::sync::{Arc, Mutex};

use spate_scheduler::Event;
use spate_types::{FinishReason, RequestId, SeqId, Timings, Usage};
use tokio::sync::Notify;

use crate::handle::Permit;
use crate::shared::{Command, Shared, lock};

/// Unread events after which a reader counts as gone. A token is at most one event, so this is
/// minutes of output for any reader that reads at all.
const MAX_BACKLOG: usize = 1 << 15;

/// The fan-out task's end of a [`TokenStream`].
pub(crate) struct StreamState {
    id: RequestId,
    inner: Mutex<Inner>,
    ready: Notify,
}

struct Inner {
    unread: Vec<Event>,
    /// Which of the `n` sequences have ended.
    finished: Vec<bool>,
    done: bool,
    /// The reader is gone or too far behind: keep nothing.
    closed: bool,
    /// Held until the engine is through with the request, whatever the reader does.
    permit: Option<Permit>,
}

impl StreamState {
    pub(crate) fn new(id: RequestId, n: u32, permit: Permit) -> Self {
        Self {
            id,
            inner: Mutex::new(Inner {
                unread: Vec::new(),
                finished: vec![false; n as usize],
                done: false,
                closed: false,
                permit: Some(permit),
            }),
            ready: Notify::new(),
        }
    }

    /// Appends an event. `false` when the reader has just fallen too far behind: abort the request.
    pub(crate) fn push(&self, event: Event) -> bool {
        let mut inner = lock(&self.inner);
        let mut keep = true;
        match &event {
            Event::Finished { seq, .. } => {
                if let Some(finished) = inner.finished.get_mut(seq.index as usize) {
                    *finished = true;
                }
            }
            Event::Done { .. } => {
                inner.done = true;
                inner.permit = None;
            }
            Event::Token { .. } | Event::PromptLogprobs { .. } => {
                keep = inner.unread.len() < MAX_BACKLOG;
            }
        }
        let first_overflow = !keep && !inner.closed;
        if first_overflow {
            inner.closed = true;
            inner.unread.clear();
        }
        // How it ended is told even to a reader that lost tokens.
        if !inner.closed || matches!(event, Event::Finished { .. } | Event::Done { .. }) {
            inner.unread.push(event);
        }
        !first_overflow
    }

    /// Ends everything that has not ended, because the engine will not.
    pub(crate) fn end(&self, reason: FinishReason) {
        let unfinished: Vec<u32> = lock(&self.inner)
            .finished
            .iter()
            .enumerate()
            .filter(|(_, finished)| !**finished)
            .map(|(index, _)| index as u32)
            .collect();
        for index in unfinished {
            self.push(Event::Finished {
                seq: SeqId {
                    request: self.id,
                    index,
                },
                reason,
            });
        }
        if !lock(&self.inner).done {
            self.push(Event::Done {
                request: self.id,
                usage: Usage::default(),
                timings: Timings::default(),
            });
        }
        self.wake();
    }

    pub(crate) fn wake(&self) {
        self.ready.notify_one();
    }
}

/// The events of one request, in order. Dropping it aborts whatever still runs.
pub struct TokenStream {
    state: Arc<StreamState>,
    shared: Arc<Shared>,
}

impl TokenStream {
    pub(crate) fn new(state: Arc<StreamState>, shared: Arc<Shared>) -> Self {
        Self { state, shared }
    }

    /// The request this is the output of.
    pub fn id(&self) -> RequestId {
        self.state.id
    }

    /// Everything that happened since the last call, never empty; waits when nothing did. `None`
    /// after [`Event::Done`] was delivered.
    ///
    /// Cancel safe. A reader that leaves 2^15 events unread loses its request: the tokens are
    /// dropped and the sequences end with [`FinishReason::Abort`].
    pub async fn next(&mut self) -> Option<Vec<Event>> {
        loop {
            {
                let mut inner = lock(&self.state.inner);
                if !inner.unread.is_empty() {
                    return Some(std::mem::take(&mut inner.unread));
                }
                if inner.done {
                    return None;
                }
            }
            self.state.ready.notified().await;
        }
    }

    /// Ends sequence `index` early (a stop string matched in its text). Its
    /// [`Event::Finished`] carries `reason`, unless it had just ended by itself.
    pub fn end(&self, index: u32, reason: FinishReason) {
        self.shared.send(Command::Finish {
            id: self.state.id,
            index: Some(index),
            reason,
        });
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        let mut inner = lock(&self.state.inner);
        inner.closed = true;
        inner.unread = Vec::new();
        if !inner.done {
            drop(inner);
            self.shared.send(Command::Finish {
                id: self.state.id,
                index: None,
                reason: FinishReason::Abort,
            });
        }
    }
}
