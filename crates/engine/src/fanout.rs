use std::sync::Arc;
use std::time::Duration;

use spate_scheduler::Event;
use spate_types::{FinishReason, RequestId};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{MissedTickBehavior, interval};

use crate::StepReport;
use crate::shared::{Command, Message, Shared};
use crate::stream::StreamState;

/// How often the engine thread is looked after.
const WATCH: Duration = Duration::from_millis(500);

/// The task between the engine thread and the streams: one wake-up a step, not one a request.
///
/// It is the watchdog, too: a step that hangs is the engine thread's own finding, but a call into the
/// executor that never returns (a driver that waits for a dead GPU) leaves nobody else to say so.
pub(crate) struct FanOut<F> {
    shared: Arc<Shared>,
    observer: F,
}

impl<F: FnMut(&StepReport) + Send + 'static> FanOut<F> {
    pub(crate) fn new(shared: Arc<Shared>, observer: F) -> Self {
        Self { shared, observer }
    }

    pub(crate) async fn run(mut self, mut messages: UnboundedReceiver<Message>) {
        let mut watch = interval(WATCH);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                message = messages.recv() => message,
                _ = watch.tick() => match self.shared.stuck() {
                    None => continue,
                    Some(reason) => {
                        tracing::error!(%reason, "engine failed");
                        self.shared.die(reason);
                        Some(Message::End(FinishReason::Error))
                    }
                },
            };
            match message {
                Some(Message::Step(report)) => {
                    (self.observer)(&report);
                    self.deliver(report.events);
                }
                Some(Message::End(reason)) => return self.end(reason),
                None => return,
            }
        }
    }

    fn end(&self, reason: FinishReason) {
        // Taken out first: ending drops permits, which wake whoever waits for idleness.
        let streams = std::mem::take(&mut *self.shared.streams());
        streams.into_values().for_each(|stream| stream.end(reason));
    }

    fn deliver(&self, events: Vec<Event>) {
        // Events of one request come in runs, so the map is asked once per run.
        let mut current: Option<(RequestId, Option<Arc<StreamState>>)> = None;
        let mut touched = Vec::new();
        for event in events {
            let id = request_of(&event);
            if current.as_ref().is_none_or(|(last, _)| *last != id) {
                let stream = self.shared.streams().get(&id).cloned();
                touched.extend(stream.clone());
                current = Some((id, stream));
            }
            let Some((_, Some(stream))) = &current else {
                continue;
            };
            if matches!(event, Event::Done { .. }) {
                self.shared.streams().remove(&id);
            }
            if !stream.push(event) {
                tracing::warn!(request = %id, "aborted: its reader is too slow");
                self.shared.send(Command::Finish {
                    id,
                    index: None,
                    reason: FinishReason::Abort,
                });
            }
        }
        touched.iter().for_each(|stream| stream.wake());
    }
}

fn request_of(event: &Event) -> RequestId {
    match event {
        Event::Token { seq, .. } | Event::Finished { seq, .. } => seq.request,
        Event::PromptLogprobs { request, .. } | Event::Done { request, .. } => *request,
    }
}
