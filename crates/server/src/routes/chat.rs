//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::Value;
use spate_types::SampledToken;

use super::{chunk_usage, head, token_ids, token_writer};
use crate::access_log::Record;
use crate::app::{App, Context};
use crate::body::JsonObject;
use crate::dto::Head;
use crate::dto::chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatMessage,
};
use crate::dto::logprobs::{ChatLogprobs, TokenWriter, prompt_logprobs};
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::generation::{Generation, Update};
use crate::messages::{read_messages, read_tools};
use crate::validate::{ChatPrompt, LogprobsField, Prompt, ValidatedRequest, read_max_tokens};
use crate::{prepare, sse};

pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    JsonObject(map): JsonObject,
) -> Result<Response, ApiError> {
    let context = app.context()?;
    let request = read(map, &context)?;
    let (generation, request) = prepare::start(&context, request, &record).await?;
    let id = app.response_id("chatcmpl", generation.prompts()[0].id());
    record.set_response_id(&id);
    if request.stream.is_some() {
        let chunks = ChatChunks {
            head: head(&context, &request, id, "chat.completion.chunk"),
            request,
        };
        return sse::respond(generation, chunks, app.config.ping_interval).await;
    }
    let head = head(&context, &request, id, "chat.completion");
    collect(generation, &request, head).await
}

fn read(
    map: serde_json::Map<String, Value>,
    context: &Context,
) -> Result<ValidatedRequest, ApiError> {
    let fields = &mut Fields::new(map);
    let prompt = Prompt::Chat(read_chat_prompt(fields)?);
    read_tools(fields)?;
    refuse_unsupported(fields)?;
    let older = read_max_tokens(fields, "max_tokens")?;
    let max_tokens = read_max_tokens(fields, "max_completion_tokens")?.or(older);
    let request = ValidatedRequest::read(
        fields,
        context,
        vec![prompt],
        max_tokens,
        LogprobsField::Chat,
    )?;
    fields.log_unknown();
    Ok(request)
}

/// The fields that make up the prompt; `/tokenize` takes them too.
pub(super) fn read_chat_prompt(fields: &mut Fields) -> Result<ChatPrompt, ApiError> {
    let messages = read_messages(fields)?;
    let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.bool("add_generation_prompt")?;
    if continue_final_message && add_generation_prompt == Some(true) {
        return Err(ApiError::field(
            "continue_final_message",
            "'continue_final_message' and 'add_generation_prompt' exclude each other",
        ));
    }
    Ok(ChatPrompt {
        messages,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(false),
        template_kwargs: fields.object("chat_template_kwargs")?,
    })
}

/// Fields of chat alone whose behaviour does not exist here.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    for name in [
        "audio",
        "chat_template",
        "documents",
        "function_call",
        "functions",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    ] {
        fields.only_default(name, |v| v.as_array().is_some_and(Vec::is_empty))?;
    }
    fields.only_default("echo", |v| *v == Value::Bool(false))?;
    fields.only_default("include_reasoning", Value::is_boolean)?;
    fields.only_default("modalities", |v| *v == serde_json::json!(["text"]))
}

async fn collect(
    mut generation: Generation,
    request: &ValidatedRequest,
    head: Head,
) -> Result<Response, ApiError> {
    let choices = generation.collect().await?;
    let writer = token_writer(&generation, request);
    let choices = choices
        .into_iter()
        .zip(0..)
        .map(|(choice, index)| ChatChoice {
            index,
            logprobs: logprobs(writer, request, &choice.tokens),
            token_ids: token_ids(request, &choice.tokens),
            message: ChatMessage {
                role: "assistant",
                content: choice.text,
                refusal: None,
            },
            finish_reason: choice.reason,
            stop_reason: choice.stop,
        });
    let prompt = &generation.prompts()[0];
    let response = ChatCompletion {
        head,
        choices: choices.collect(),
        usage: generation.usage(),
        prompt_logprobs: request
            .sampling
            .prompt_logprobs
            .map(|_| prompt_logprobs(generation.tokenizer(), prompt.logprobs())),
        prompt_token_ids: request.output.token_ids.then(|| prompt.tokens().to_vec()),
    };
    Ok(Json(response).into_response())
}

fn logprobs(
    writer: TokenWriter<'_>,
    request: &ValidatedRequest,
    tokens: &[SampledToken],
) -> Option<ChatLogprobs> {
    let with_logprobs = tokens.iter().filter_map(|token| token.logprobs.as_deref());
    request
        .sampling
        .logprobs
        .map(|_| ChatLogprobs::new(writer, with_logprobs))
}

/// The chunks of a streamed chat.
struct ChatChunks {
    head: Head,
    request: ValidatedRequest,
}

impl ChatChunks {
    fn push(
        &self,
        generation: &Generation,
        choice: ChatChunkChoice<'_>,
        prompt_token_ids: Option<&[u32]>,
        out: &mut Vec<u8>,
    ) {
        let chunk = ChatChunk {
            head: &self.head,
            choices: &[choice],
            usage: chunk_usage(&self.request, generation),
            prompt_token_ids,
        };
        sse::push_event(out, &chunk);
    }
}

impl sse::Chunks for ChatChunks {
    fn begin(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        let prompt = generation.prompts()[0].tokens();
        for index in 0..generation.choices() {
            let choice = ChatChunkChoice {
                index,
                delta: ChatDelta {
                    role: Some("assistant"),
                    content: Some(""),
                },
                ..ChatChunkChoice::default()
            };
            let prompt_ids = (index == 0 && self.request.output.token_ids).then_some(prompt);
            self.push(generation, choice, prompt_ids, out);
        }
    }

    fn update(&mut self, generation: &Generation, update: Update, out: &mut Vec<u8>) {
        match update {
            Update::Delta(delta) => {
                let writer = token_writer(generation, &self.request);
                let choice = ChatChunkChoice {
                    index: delta.choice,
                    delta: ChatDelta {
                        role: None,
                        content: Some(&delta.text),
                    },
                    logprobs: logprobs(writer, &self.request, &delta.tokens),
                    token_ids: token_ids(&self.request, &delta.tokens),
                    ..ChatChunkChoice::default()
                };
                self.push(generation, choice, None, out);
            }
            Update::Finished {
                choice,
                reason,
                stop,
            } => {
                let choice = ChatChunkChoice {
                    index: choice,
                    finish_reason: Some(reason),
                    stop_reason: stop.as_ref(),
                    ..ChatChunkChoice::default()
                };
                self.push(generation, choice, None, out);
            }
        }
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        if self.request.stream.unwrap_or_default().include_usage {
            let chunk = ChatChunk {
                head: &self.head,
                choices: &[],
                usage: Some(Some(generation.usage())),
                prompt_token_ids: None,
            };
            sse::push_event(out, &chunk);
        }
    }
}
