use std::sync::Arc;

use spate_scheduler::Event;
use spate_types::{FinishReason, RequestId};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::StepReport;
use crate::shared::{Command, Message, Shared};
use crate::stream::StreamState;

/// The task between the engine thread and the streams: one wake-up a step, not one a request.
pub(crate) struct FanOut<F> {
    shared: Arc<Shared>,
    observer: F,
}

impl<F: FnMut(&StepReport) + Send + 'static> FanOut<F> {
    pub(crate) fn new(shared: Arc<Shared>, observer: F) -> Self {
        Self { shared, observer }
    }

    pub(crate) async fn run(mut self, mut messages: UnboundedReceiver<Message>) {
        while let Some(message) = messages.recv().await {
            match message {
                Message::Step(report) => {
                    (self.observer)(&report);
                    self.deliver(report.events);
                }
                Message::End(reason) => {
                    // Taken out first: ending drops permits, which wake whoever waits for idleness.
                    let streams = std::mem::take(&mut *self.shared.streams());
                    streams.into_values().for_each(|stream| stream.end(reason));
                }
            }
        }
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
