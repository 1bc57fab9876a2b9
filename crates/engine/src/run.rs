use std::any::Any;
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use spate_executor::{Executor, ExecutorError, Lane, Ticket};
use spate_scheduler::Scheduler;
use spate_types::FinishReason;
use tokio::sync::mpsc::UnboundedSender;

use crate::StepReport;
use crate::shared::{Command, Message, Shared};

/// Longest sleep while requests wait and nothing runs. The scheduler always has a step for a live
/// request unless it waits for its deadline, so this is a backstop, not a poll.
const MAX_NAP: Duration = Duration::from_millis(100);

/// The engine thread's state.
pub(crate) struct Runner {
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    outbox: UnboundedSender<Message>,
    /// Steps submitted and not yet committed, oldest first, over all lanes.
    in_flight: VecDeque<Step>,
}

struct Step {
    ticket: Ticket,
    lane: Lane,
    submitted: Instant,
    tokens: u32,
    rows: u32,
}

/// Why the loop ended well.
struct Shutdown;

impl Runner {
    pub(crate) fn new(
        executor: Box<dyn Executor>,
        scheduler: Scheduler,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
        outbox: UnboundedSender<Message>,
    ) -> Self {
        Self {
            executor,
            scheduler,
            shared,
            commands,
            outbox,
            in_flight: VecDeque::new(),
        }
    }

    /// Runs until shutdown or failure, and says which to everybody who waits.
    pub(crate) fn run_to_end(mut self) {
        let end = std::panic::catch_unwind(AssertUnwindSafe(|| self.run()));
        let reason = match end {
            Ok(Ok(Shutdown)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!(
                "the engine thread panicked: {}",
                panic_text(&*panic)
            )),
        };
        let end = if reason.is_some() {
            FinishReason::Error
        } else {
            FinishReason::Abort
        };
        if let Some(reason) = reason {
            tracing::error!(%reason, "engine failed");
            self.shared.die(reason);
        }
        // The inbox closes first: whoever still got a request in has its stream registered by now,
        // so the fan-out task ends it with the others.
        drop(self.commands);
        let _ = self.outbox.send(Message::End(end));
    }

    fn run(&mut self) -> Result<Shutdown, ExecutorError> {
        self.publish(None);
        loop {
            if let Some(shutdown) = self.take_commands() {
                return Ok(shutdown);
            }
            self.beat();
            self.fill_lanes()?;
            let step = self.await_step()?;
            self.release_slots();
            self.publish(step);
        }
    }

    /// Drains the inbox; parks when there is nothing at all to do.
    fn take_commands(&mut self) -> Option<Shutdown> {
        loop {
            let command = if self.scheduler.is_idle() {
                if cfg!(debug_assertions) {
                    self.scheduler.check_invariants();
                }
                self.shared.heartbeat.store(0, Ordering::Release);
                self.commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(command) => {
                    if let Some(shutdown) = self.obey(command) {
                        return Some(shutdown);
                    }
                }
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(Shutdown),
            }
        }
    }

    fn obey(&mut self, command: Command) -> Option<Shutdown> {
        let now = self.shared.now();
        match command {
            Command::Add(request) => {
                let id = request.id;
                if let Err(error) = self.scheduler.add(request, now) {
                    // Admission and `validate` came first, so this is a disagreement between the two.
                    tracing::error!(request = %id, %error, "the scheduler refused an admitted request");
                    if let Some(stream) = self.shared.streams().remove(&id) {
                        stream.end(FinishReason::Error);
                    }
                }
            }
            Command::Finish { id, index, reason } => self.scheduler.finish(id, index, reason, now),
            Command::Shutdown => return Some(Shutdown),
        }
        None
    }

    /// Submits steps until every lane has as many in flight as it takes.
    fn fill_lanes(&mut self) -> Result<(), ExecutorError> {
        let depth = self.shared.capacity.depth as usize;
        for lane in self.shared.capacity.lanes.clone() {
            let mut flying = self.in_flight.iter().filter(|s| s.lane == lane).count();
            while flying < depth {
                let Some(batch) = self.scheduler.plan(lane, self.shared.now()) else {
                    break;
                };
                let tokens = batch.rows.iter().map(|row| row.input.len() as u32).sum();
                let rows = batch.rows.len() as u32;
                let ticket = self.executor.submit(lane, batch)?;
                self.in_flight.push_back(Step {
                    ticket,
                    lane,
                    submitted: Instant::now(),
                    tokens,
                    rows,
                });
                flying += 1;
            }
        }
        Ok(())
    }

    /// Waits for the next step to come back and commits it. With nothing in flight, naps until
    /// something arrives or a deadline passes.
    fn await_step(&mut self) -> Result<Option<(Step, Duration)>, ExecutorError> {
        let Some(oldest) = self.in_flight.front() else {
            self.nap();
            return Ok(None);
        };
        let limit = self.shared.config.step_timeout;
        let Some(done) = self.executor.wait(oldest.submitted + limit)? else {
            return Err(ExecutorError::Fatal(format!(
                "a step of {} tokens did not finish within {limit:?}",
                oldest.tokens
            )));
        };
        let position = self.in_flight.iter().position(|s| s.ticket == done.ticket);
        let Some(step) = position.and_then(|i| self.in_flight.remove(i)) else {
            return Err(ExecutorError::Fatal(format!(
                "{:?} came back but is not in flight",
                done.ticket
            )));
        };
        self.scheduler
            .commit(step.lane, done.outputs, self.shared.now());
        Ok(Some((step, done.busy)))
    }

    fn nap(&mut self) {
        if self.scheduler.is_idle() {
            return; // `take_commands` parks
        }
        let nap = self.scheduler.next_deadline().map_or(MAX_NAP, |deadline| {
            Duration::from_micros(deadline.saturating_sub(self.shared.now())).min(MAX_NAP)
        });
        match self.commands.recv_timeout(nap) {
            Ok(command) => {
                if let Some(Shutdown) = self.obey(command) {
                    self.shared.send(Command::Shutdown); // for `take_commands` to see
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }

    fn release_slots(&mut self) {
        for slot in self.scheduler.take_released() {
            self.executor.release(slot);
        }
    }

    fn publish(&mut self, step: Option<(Step, Duration)>) {
        let events = self.scheduler.take_events();
        let stats = self.scheduler.stats();
        self.shared.publish_stats(stats);
        let (lane, batch_tokens, batch_rows, busy) = match step {
            Some((step, busy)) => (Some(step.lane), step.tokens, step.rows, busy),
            None => (None, 0, 0, Duration::ZERO),
        };
        // The receiver outlives the loop; if the runtime is gone there is nobody left to tell.
        let _ = self.outbox.send(Message::Step(StepReport {
            lane,
            batch_tokens,
            batch_rows,
            busy,
            now: self.shared.now(),
            stats,
            events,
        }));
    }

    fn beat(&self) {
        self.shared
            .heartbeat
            .store(self.shared.now(), Ordering::Release);
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
