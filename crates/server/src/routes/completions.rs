//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Map, Value};
use spate_types::{SampledToken, TokenId};

use super::{chunk_usage, head, token_ids, token_writer};
use crate::access_log::Record;
use crate::app::{App, Context};
use crate::body::JsonObject;
use crate::dto::Head;
use crate::dto::completions::{
    Completion, CompletionChoice, CompletionChunk, CompletionChunkChoice,
};
use crate::dto::logprobs::{CompletionLogprobs, TokenWriter, prompt_logprobs};
use crate::errors::ApiError;
use crate::fields::{self, Fields, wrong_type};
use crate::generation::{Collected, Generation, Running, Update};
use crate::validate::{LogprobsField, MaxTokens, Prompt, ValidatedRequest, read_max_tokens};
use crate::{prepare, sse};

/// OpenAI's default for this endpoint.
const DEFAULT_MAX_TOKENS: MaxTokens = MaxTokens {
    limit: 16,
    field: None,
};

pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    JsonObject(map): JsonObject,
) -> Result<Response, ApiError> {
    let context = app.context()?;
    let request = read(map, &context)?;
    let (generation, request) = prepare::start(&context, request, &record).await?;
    let id = app.response_id("cmpl", generation.prompts()[0].id());
    record.set_response_id(&id);
    let head = head(&context, &request, id, "text_completion");
    if request.stream.is_some() {
        let chunks = CompletionChunks {
            head,
            offsets: vec![0; generation.choices() as usize],
            request,
        };
        return sse::respond(generation, chunks, app.config.ping_interval).await;
    }
    collect(generation, &request, head).await
}

fn read(map: Map<String, Value>, context: &Context) -> Result<ValidatedRequest, ApiError> {
    let fields = &mut Fields::new(map);
    fields.only_default("suffix", |v| v.as_str() == Some(""))?;
    let prompts = read_prompts(fields, context)?;
    let max_tokens = read_max_tokens(fields, "max_tokens")?.or(Some(DEFAULT_MAX_TOKENS));
    let mut request = ValidatedRequest::read(
        fields,
        context,
        prompts,
        max_tokens,
        LogprobsField::Completions,
    )?;
    request.output.echo = fields.bool("echo")?.unwrap_or(false);
    fields.log_unknown();
    if request.output.echo
        && let Some(top) = request.sampling.logprobs
    {
        // The echoed tokens have logprobs too; a stream would have to hold its first chunk back.
        if request.stream.is_some() {
            return Err(ApiError::field(
                "echo",
                "'echo' with 'logprobs' is not available with 'stream'",
            ));
        }
        let asked = request.sampling.prompt_logprobs.unwrap_or(0);
        request.sampling.prompt_logprobs = Some(asked.max(top));
    }
    Ok(request)
}

/// `prompt` as a text, token ids, or an array of either.
fn read_prompts(fields: &mut Fields, context: &Context) -> Result<Vec<Prompt>, ApiError> {
    const NAME: &str = "prompt";
    let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
    let vocab_size = context.model.vocab_size();
    let text = |text: String| match text.is_empty() {
        true => Err(ApiError::field(NAME, "'prompt' must not be empty")),
        false => Ok(Prompt::Text {
            text,
            add_special_tokens,
        }),
    };
    let ids = |ids: &[Value]| read_token_ids(NAME, ids, vocab_size).map(Prompt::Tokens);
    let expected = "a string, an array of token ids, or an array of either";
    match fields.take(NAME) {
        None => Err(ApiError::field(NAME, "'prompt' is required")),
        Some(Value::String(one)) => Ok(vec![text(one)?]),
        Some(Value::Array(items)) if items.first().is_some_and(Value::is_number) => {
            Ok(vec![ids(&items)?])
        }
        Some(Value::Array(items)) => {
            let most = context.app.config.max_prompts;
            if items.is_empty() || items.len() > most {
                return Err(ApiError::field(
                    NAME,
                    format!(
                        "'{NAME}' must have 1 to {most} prompts, got {}",
                        items.len()
                    ),
                ));
            }
            let read = |item| match item {
                Value::String(one) => text(one),
                Value::Array(one) => ids(&one),
                other => Err(wrong_type(NAME, expected, &other)),
            };
            items.into_iter().map(read).collect()
        }
        Some(other) => Err(wrong_type(NAME, expected, &other)),
    }
}

/// Token ids that exist, at least one.
pub(super) fn read_token_ids(
    name: &str,
    ids: &[Value],
    vocab_size: u32,
) -> Result<Vec<TokenId>, ApiError> {
    if ids.is_empty() {
        return Err(ApiError::field(name, format!("'{name}' must not be empty")));
    }
    ids.iter()
        .map(|id| fields::integer(name, id, 0..=vocab_size - 1))
        .collect()
}

async fn collect(
    mut generation: Generation,
    request: &ValidatedRequest,
    head: Head,
) -> Result<Response, ApiError> {
    let choices = generation.collect().await?;
    let choices = (0..).zip(choices).map(|(index, choice)| {
        let prompt = generation.prompt_of(index);
        finished_choice(&generation, request, index, prompt, choice)
    });
    let response = Completion {
        head,
        choices: choices.collect(),
        usage: generation.usage(),
    };
    Ok(Json(response).into_response())
}

fn finished_choice(
    generation: &Generation,
    request: &ValidatedRequest,
    index: u32,
    prompt: &Running,
    choice: Collected,
) -> CompletionChoice {
    let writer = token_writer(generation, request);
    let logprobs = request.sampling.logprobs.map(|_| {
        let mut columns = CompletionLogprobs::default();
        let mut offset = 0;
        if request.output.echo {
            offset = columns.push_unpredicted(writer, prompt.tokens()[0], offset);
            for token in prompt.logprobs() {
                offset = columns.push(writer, token, offset);
            }
        }
        push_logprobs(&mut columns, writer, &choice.tokens, offset);
        columns
    });
    CompletionChoice {
        index,
        text: prompt.echo().unwrap_or_default().to_owned() + &choice.text,
        logprobs,
        finish_reason: choice.reason,
        stop_reason: choice.stop,
        prompt_logprobs: request
            .sampling
            .prompt_logprobs
            .map(|_| prompt_logprobs(generation.tokenizer(), prompt.logprobs())),
        prompt_token_ids: request.output.token_ids.then(|| prompt.tokens().to_vec()),
        token_ids: token_ids(request, &choice.tokens),
    }
}

/// Appends tokens whose text begins at `offset`; returns where the next one begins.
fn push_logprobs(
    columns: &mut CompletionLogprobs,
    writer: TokenWriter<'_>,
    tokens: &[SampledToken],
    offset: usize,
) -> usize {
    tokens
        .iter()
        .filter_map(|token| token.logprobs.as_deref())
        .fold(offset, |offset, token| columns.push(writer, token, offset))
}

/// The chunks of a streamed completion.
struct CompletionChunks {
    head: Head,
    request: ValidatedRequest,
    /// Where each choice's next token begins, in characters.
    offsets: Vec<usize>,
}

impl CompletionChunks {
    fn push(&self, generation: &Generation, choice: CompletionChunkChoice<'_>, out: &mut Vec<u8>) {
        let chunk = CompletionChunk {
            head: &self.head,
            choices: &[choice],
            usage: chunk_usage(&self.request, generation),
        };
        sse::push_event(out, &chunk);
    }
}

impl sse::Chunks for CompletionChunks {
    fn begin(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        let with_ids = self.request.output.token_ids;
        for index in 0..generation.choices() {
            let prompt = generation.prompt_of(index);
            if prompt.echo().is_none() && !with_ids {
                continue;
            }
            let choice = CompletionChunkChoice {
                index,
                text: prompt.echo().unwrap_or_default(),
                prompt_token_ids: with_ids.then_some(prompt.tokens()),
                ..CompletionChunkChoice::default()
            };
            self.push(generation, choice, out);
        }
    }

    fn update(&mut self, generation: &Generation, update: Update, out: &mut Vec<u8>) {
        match update {
            Update::Delta(delta) => {
                let logprobs = self.request.sampling.logprobs.map(|_| {
                    let mut columns = CompletionLogprobs::default();
                    let offset = &mut self.offsets[delta.choice as usize];
                    let writer = token_writer(generation, &self.request);
                    *offset = push_logprobs(&mut columns, writer, &delta.tokens, *offset);
                    columns
                });
                let choice = CompletionChunkChoice {
                    index: delta.choice,
                    text: &delta.text,
                    logprobs,
                    token_ids: token_ids(&self.request, &delta.tokens),
                    ..CompletionChunkChoice::default()
                };
                self.push(generation, choice, out);
            }
            Update::Finished {
                choice,
                reason,
                stop,
            } => {
                let choice = CompletionChunkChoice {
                    index: choice,
                    finish_reason: Some(reason),
                    stop_reason: stop.as_ref(),
                    ..CompletionChunkChoice::default()
                };
                self.push(generation, choice, out);
            }
        }
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        if self.request.stream.unwrap_or_default().include_usage {
            let chunk = CompletionChunk {
                head: &self.head,
                choices: &[],
                usage: Some(Some(generation.usage())),
            };
            sse::push_event(out, &chunk);
        }
    }
}
