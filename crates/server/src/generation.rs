//! From token events to text: one state machine for streamed and collected responses.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use spate_engine::{Event, Health, TokenStream};
use spate_text::{Detokenizer, StopMatcher, Tokenizer};
use spate_types::{FinishReason, Logprobs, RequestId, SampledToken, StopParams, Timings, TokenId};

use crate::access_log::Record;
use crate::app::{Context, ServedModel};
use crate::dto::{StopReason, Usage};
use crate::errors::ApiError;
use crate::validate::ValidatedRequest;

/// One prompt on the engine.
pub(crate) struct Running {
    id: RequestId,
    /// `None` once everything of it was read.
    stream: Option<TokenStream>,
    stop: Arc<StopParams>,
    tokens: Arc<[TokenId]>,
    echo: Option<String>,
    logprobs: Vec<Logprobs>,
}

impl Running {
    pub(crate) fn new(
        stream: TokenStream,
        tokens: Arc<[TokenId]>,
        echo: Option<String>,
        stop: Arc<StopParams>,
    ) -> Self {
        Self {
            id: stream.id(),
            stream: Some(stream),
            stop,
            tokens,
            echo,
            logprobs: Vec::new(),
        }
    }

    /// Its id in the engine.
    pub(crate) fn id(&self) -> RequestId {
        self.id
    }

    /// The prompt's tokens.
    pub(crate) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The prompt's text, if the response begins with it.
    pub(crate) fn echo(&self) -> Option<&str> {
        self.echo.as_deref()
    }

    /// Logprobs of the prompt's tokens from the second on, as far as they have come.
    pub(crate) fn logprobs(&self) -> &[Logprobs] {
        &self.logprobs
    }
}

/// What the client gets to see next.
#[derive(Debug)]
pub(crate) enum Update {
    /// A choice has grown.
    Delta(Delta),
    /// A choice has ended; nothing of it follows.
    Finished {
        choice: u32,
        reason: &'static str,
        stop: Option<StopReason>,
    },
}

#[derive(Debug)]
pub(crate) struct Delta {
    pub(crate) choice: u32,
    /// May be empty: text that could begin a stop string, or half a character, is held back.
    pub(crate) text: String,
    /// The tokens behind it, when the client wants to see tokens.
    pub(crate) tokens: Vec<SampledToken>,
}

/// A choice from its first to its last token.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) text: String,
    /// When the client wants to see tokens.
    pub(crate) tokens: Vec<SampledToken>,
    /// Why it ended.
    pub(crate) reason: &'static str,
    pub(crate) stop: Option<StopReason>,
}

/// A request on its way through the engine. Dropping it aborts what still runs.
pub(crate) struct Generation {
    model: Arc<ServedModel>,
    running: Vec<Running>,
    choices: Vec<Choice>,
    n: u32,
    min_tokens: u32,
    include_stop: bool,
    /// Whether deltas carry tokens.
    want_tokens: bool,
    cached_tokens: u32,
    past_deadline: bool,
    record: Arc<Record>,
}

/// One choice of the response: choice `prompt * n + index`.
struct Choice {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    tokens: u32,
    ended: bool,
}

impl Generation {
    pub(crate) fn new(
        context: &Context,
        request: &ValidatedRequest,
        running: Vec<Running>,
        record: Arc<Record>,
    ) -> Self {
        let model = context.model.clone();
        let choices = (0..running.len() * request.n as usize)
            .map(|_| Choice {
                detokenizer: Detokenizer::new(model.tokenizer.clone(), request.skip_special_tokens),
                matcher: StopMatcher::new(request.stop_strings.clone(), request.include_stop),
                tokens: 0,
                ended: false,
            })
            .collect();
        Self {
            running,
            choices,
            n: request.n,
            min_tokens: request.sampling.min_tokens,
            include_stop: request.include_stop,
            want_tokens: request.sampling.logprobs.is_some() || request.output.token_ids,
            cached_tokens: 0,
            past_deadline: false,
            record,
            model,
        }
    }

    pub(crate) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.model.tokenizer
    }

    /// The prompts, in the order of the request.
    pub(crate) fn prompts(&self) -> &[Running] {
        &self.running
    }

    /// The prompt that a choice continues.
    pub(crate) fn prompt_of(&self, choice: u32) -> &Running {
        &self.running[(choice / self.n) as usize]
    }

    pub(crate) fn choices(&self) -> u32 {
        self.choices.len() as u32
    }

    /// Tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        let prompt_tokens = self.running.iter().map(|r| r.tokens.len() as u32).sum();
        let completion_tokens = self.choices.iter().map(|choice| choice.tokens).sum();
        Usage::new(prompt_tokens, completion_tokens, self.cached_tokens)
    }

    /// What happened since the last call, never empty; `None` when the request is through.
    /// Cancel safe.
    ///
    /// # Errors
    /// The request failed as a whole; there is nothing more to come.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Update>>, ApiError> {
        loop {
            let ready = self.next_events().await;
            if ready.is_empty() {
                return Ok(None);
            }
            let mut updates = Vec::new();
            for (prompt, events) in ready {
                match events {
                    Some(events) => self.absorb(prompt, events, &mut updates)?,
                    None => self.running[prompt].stream = None,
                }
            }
            if !updates.is_empty() {
                return Ok(Some(updates));
            }
        }
    }

    /// Waits for the end and gives every choice whole.
    pub(crate) async fn collect(&mut self) -> Result<Vec<Collected>, ApiError> {
        let mut choices = Vec::new();
        choices.resize_with(self.choices.len(), Collected::default);
        while let Some(updates) = self.next().await? {
            for update in updates {
                match update {
                    Update::Delta(delta) => {
                        let choice = &mut choices[delta.choice as usize];
                        choice.text.push_str(&delta.text);
                        choice.tokens.extend(delta.tokens);
                    }
                    Update::Finished {
                        choice,
                        reason,
                        stop,
                    } => {
                        let choice = &mut choices[choice as usize];
                        choice.reason = reason;
                        choice.stop = stop;
                    }
                }
            }
        }
        Ok(choices)
    }

    /// Waits for events of any prompt and gives those of every prompt that has some, with its index
    /// (`None`: there will be no more of it). Empty when no prompt is left.
    async fn next_events(&mut self) -> Vec<(usize, Option<Vec<Event>>)> {
        let mut waits = Vec::new();
        for (prompt, running) in self.running.iter_mut().enumerate() {
            if let Some(stream) = &mut running.stream {
                waits.push((prompt, Box::pin(stream.next())));
            }
        }
        if waits.is_empty() {
            return Vec::new();
        }
        // None is polled again after it was ready: then this ends, and the waits with it.
        poll_fn(|cx| {
            let mut ready = Vec::new();
            for (prompt, wait) in &mut waits {
                if let Poll::Ready(events) = wait.as_mut().poll(cx) {
                    ready.push((*prompt, events));
                }
            }
            match ready.is_empty() {
                true => Poll::Pending,
                false => Poll::Ready(ready),
            }
        })
        .await
    }

    fn absorb(
        &mut self,
        prompt: usize,
        events: Vec<Event>,
        updates: &mut Vec<Update>,
    ) -> Result<(), ApiError> {
        for event in events {
            match event {
                Event::Token { seq, token } => self.take_token(prompt, seq.index, token, updates),
                Event::PromptLogprobs { logprobs, .. } => {
                    self.running[prompt].logprobs.extend(logprobs);
                }
                Event::Finished { seq, reason } => {
                    self.take_finish(prompt, seq.index, reason, updates)?;
                }
                Event::Done { usage, timings, .. } => {
                    self.running[prompt].stream = None;
                    self.cached_tokens += usage.cached_tokens;
                    self.record.set_timings(&timings);
                    if self.past_deadline {
                        return Err(deadline_error(&timings));
                    }
                }
            }
        }
        Ok(())
    }

    fn take_token(
        &mut self,
        prompt: usize,
        index: u32,
        token: SampledToken,
        updates: &mut Vec<Update>,
    ) {
        let number = prompt as u32 * self.n + index;
        let running = &self.running[prompt];
        let choice = &mut self.choices[number as usize];
        if choice.ended {
            return; // sampled before the engine heard that a stop string matched
        }
        choice.tokens += 1;
        let id = token.token;
        let ends = running.stop.eos_ids.contains(&id) || running.stop.token_ids.contains(&id);
        let text = match ends && !self.include_stop {
            true => String::new(),
            false => choice.detokenizer.push(id),
        };
        // Before `min_tokens` nothing may stop the text.
        let (text, matched) = match choice.tokens <= self.min_tokens {
            true => (text, None),
            false => {
                let matched = choice.matcher.push(&text);
                (matched.emit, matched.stop)
            }
        };
        push_delta(updates, number, text, self.want_tokens.then_some(token));
        if let Some(stop) = matched {
            choice.ended = true;
            if let Some(stream) = &running.stream {
                stream.end(index, FinishReason::Stop(None));
            }
            self.record.set_finish("stop");
            updates.push(Update::Finished {
                choice: number,
                reason: "stop",
                stop: Some(StopReason::Text(stop)),
            });
        }
    }

    fn take_finish(
        &mut self,
        prompt: usize,
        index: u32,
        reason: FinishReason,
        updates: &mut Vec<Update>,
    ) -> Result<(), ApiError> {
        let number = prompt as u32 * self.n + index;
        let choice = &mut self.choices[number as usize];
        if choice.ended {
            return Ok(());
        }
        choice.ended = true;
        let (reason, stop) = match reason {
            FinishReason::Stop(id) => ("stop", id.map(StopReason::Token)),
            FinishReason::Length => ("length", None),
            FinishReason::Deadline => {
                // Whether it ever ran is known when it is done.
                self.past_deadline = true;
                self.record.set_finish("deadline");
                return Ok(());
            }
            FinishReason::Abort | FinishReason::Error => {
                self.record.set_finish("error");
                return Err(self.failure(reason));
            }
        };
        let rest = choice.detokenizer.flush();
        let mut matched = choice.matcher.push(&rest);
        let (reason, stop) = match matched.stop.take() {
            Some(text) => ("stop", Some(StopReason::Text(text))),
            None => {
                matched.emit.push_str(&choice.matcher.flush());
                (reason, stop)
            }
        };
        if !matched.emit.is_empty() {
            push_delta(updates, number, matched.emit, None);
        }
        self.record.set_finish(reason);
        updates.push(Update::Finished {
            choice: number,
            reason,
            stop,
        });
        Ok(())
    }

    fn failure(&self, reason: FinishReason) -> ApiError {
        match (self.model.engine.health(), reason) {
            (Health::Dead(reason), _) => {
                ApiError::unavailable(format!("the engine has failed: {reason}"), 10)
                    .with_code("engine_dead")
            }
            (_, FinishReason::Abort) => ApiError::unavailable(
                "the request was aborted: the server is stopping, or its output was not read in time",
                5,
            )
            .with_code("aborted"),
            _ => ApiError::new(
                http::StatusCode::INTERNAL_SERVER_ERROR,
                "the model's output was not a number; this request alone has failed",
            ),
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.record.set_usage(&self.usage());
    }
}

/// Appends to the choice's last delta when nothing came in between: a reader that lags gets fewer,
/// larger chunks.
fn push_delta(updates: &mut Vec<Update>, choice: u32, text: String, token: Option<SampledToken>) {
    if let Some(Update::Delta(last)) = updates.last_mut()
        && last.choice == choice
    {
        last.text.push_str(&text);
        last.tokens.extend(token);
    } else if !text.is_empty() || token.is_some() {
        updates.push(Update::Delta(Delta {
            choice,
            text,
            tokens: token.into_iter().collect(),
        }));
    }
}

fn deadline_error(timings: &Timings) -> ApiError {
    if timings.scheduled == 0 {
        ApiError::unavailable("the request waited in the queue until its time limit", 1)
            .with_code("queue_timeout")
    } else {
        ApiError::new(
            http::StatusCode::GATEWAY_TIMEOUT,
            "the request did not finish within its time limit",
        )
        .with_code("timeout")
    }
}
