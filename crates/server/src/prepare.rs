//! From a validated request to running generations: admission, rendering, tokenizing, submission.

use std::sync::Arc;

use serde_json::Value;
use spate_text::{TemplateInput, TextError};
use spate_types::{GenerationRequest, StopParams, TokenId};

use crate::access_log::Record;
use crate::app::{Context, ServedModel};
use crate::errors::ApiError;
use crate::generation::{Generation, Running};
use crate::validate::{ChatPrompt, MaxTokens, Prompt, ValidatedRequest};

/// A prompt as the engine takes it.
struct Encoded {
    /// The request field it came in.
    field: &'static str,
    tokens: Arc<[TokenId]>,
    /// Its text, when the response begins with it.
    echo: Option<String>,
}

/// Starts a request: its sequences are counted against the queue before anything is tokenized.
pub(crate) async fn start(
    context: &Context,
    mut request: ValidatedRequest,
    record: &Arc<Record>,
) -> Result<(Generation, ValidatedRequest), ApiError> {
    if let Some(id) = &request.client_id {
        record.set_request_id(id);
    }
    let engine = &context.model.engine;
    let permits = request
        .prompts
        .iter()
        .map(|_| engine.admit(request.n))
        .collect::<Result<Vec<_>, _>>()
        .inspect_err(|e| context.app.metrics.count_rejection(e))?;
    let limit = context.app.config.request_timeout;
    let deadline = limit.map(|limit| engine.now().saturating_add(limit.as_micros() as u64));

    let prompts = std::mem::take(&mut request.prompts);
    let model = context.model.clone();
    let echo = request.output.echo;
    let encoded = context
        .app
        .run_text_work(move || {
            prompts
                .into_iter()
                .map(|prompt| encode(&model, prompt, echo))
                .collect::<Result<Vec<_>, _>>()
        })
        .await?;

    // All prompts are checked before the first one runs.
    let max_tokens = encoded
        .iter()
        .map(|prompt| room_for_output(&context.model, prompt, &request))
        .collect::<Result<Vec<_>, _>>()?;

    let mut running = Vec::with_capacity(encoded.len());
    for ((prompt, permit), max_tokens) in encoded.into_iter().zip(permits).zip(max_tokens) {
        let stop = stop_params(&context.model, &request, max_tokens);
        let mut sampling = request.sampling.clone();
        if sampling.min_tokens > 0 {
            sampling.min_tokens_banned = [&stop.eos_ids[..], &stop.token_ids].concat();
            sampling.min_tokens_banned.sort_unstable();
            sampling.min_tokens_banned.dedup();
        }
        let stop = Arc::new(stop);
        let stream = engine.submit(
            permit,
            GenerationRequest {
                id: engine.next_id(),
                prompt: prompt.tokens.clone(),
                sampling: Arc::new(sampling),
                stop: stop.clone(),
                n: request.n,
                priority: request.priority,
                cache_salt: request.cache_salt.clone(),
                deadline,
            },
        )?;
        if let Some(metrics) = context.app.engine_metrics() {
            metrics.request_submitted(request.n, max_tokens);
        }
        running.push(Running::new(stream, prompt.tokens, prompt.echo, stop));
    }
    let generation = Generation::new(context, &request, running, record.clone());
    Ok((generation, request))
}

fn stop_params(model: &ServedModel, request: &ValidatedRequest, max_tokens: u32) -> StopParams {
    StopParams {
        max_tokens,
        eos_ids: match request.ignore_eos {
            true => Vec::new(),
            false => model.tokenizer.eos_ids().to_vec(),
        },
        token_ids: request.stop_ids.clone(),
    }
}

/// How many tokens a prompt's output may have.
fn room_for_output(
    model: &ServedModel,
    prompt: &Encoded,
    request: &ValidatedRequest,
) -> Result<u32, ApiError> {
    let max_model_len = model.max_model_len;
    let capacity = model.engine.capacity();
    let kv_tokens = capacity.blocks as usize * capacity.block_size as usize;
    let len = prompt.tokens.len();
    let room = max_model_len as usize - len.min(max_model_len as usize);
    if room == 0 {
        return Err(ApiError::context_length(
            prompt.field,
            format!(
                "the context holds {max_model_len} tokens; the prompt has {len}, which leaves no room for output"
            ),
        ));
    }
    let room = room as u32;
    let max_tokens = match request.max_tokens {
        // Nothing was asked for: what can be had, when the KV pool is smaller than the context.
        None => room.min((kv_tokens + 1).saturating_sub(len).max(1) as u32),
        Some(MaxTokens { limit, field: None }) => limit.min(room),
        Some(MaxTokens {
            limit,
            field: Some(field),
        }) if limit > room => {
            return Err(ApiError::context_length(
                field,
                format!(
                    "the context holds {max_model_len} tokens; the prompt has {len} and '{field}' asks for {limit} more"
                ),
            ));
        }
        Some(MaxTokens { limit, .. }) => limit,
    };
    if request.sampling.min_tokens > max_tokens {
        return Err(ApiError::field(
            "min_tokens",
            format!(
                "'min_tokens' must be at most {max_tokens}, the most output tokens this request can have"
            ),
        ));
    }
    Ok(max_tokens)
}

fn encode(model: &ServedModel, prompt: Prompt, echo: bool) -> Result<Encoded, ApiError> {
    let (field, tokens, text) = match prompt {
        Prompt::Tokens(tokens) => {
            let text = echo.then(|| model.tokenizer.decode(&tokens, false));
            ("prompt", tokens, text)
        }
        Prompt::Text {
            text,
            add_special_tokens,
        } => {
            let tokens = encode_text(model, &text, add_special_tokens)?;
            ("prompt", tokens, echo.then_some(text))
        }
        Prompt::Chat(chat) => ("messages", encode_chat(model, &chat)?, None),
    };
    if tokens.is_empty() {
        return Err(ApiError::field(field, format!("'{field}' gives no tokens")));
    }
    Ok(Encoded {
        field,
        tokens: tokens.into(),
        echo: text,
    })
}

/// Tokens of a text in which special tokens may be written out.
pub(crate) fn encode_text(
    model: &ServedModel,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<TokenId>, ApiError> {
    refuse_hopeless(model, text.len(), "prompt")?;
    let encoded = model.tokenizer.encode(text, add_special_tokens, true);
    encoded.map_err(|e| text_error("prompt", &e))
}

/// Tokens of a conversation. Special tokens count only where the template wrote them: in the
/// messages they are plain text.
pub(crate) fn encode_chat(
    model: &ServedModel,
    chat: &ChatPrompt,
) -> Result<Vec<TokenId>, ApiError> {
    let Some(template) = &model.template else {
        return Err(ApiError::field(
            "messages",
            "this model has no chat template; use /v1/completions",
        ));
    };
    let bytes = text_bytes(&chat.messages);
    refuse_hopeless(model, bytes, "messages")?;
    let rendered = template
        .render(&TemplateInput {
            messages: &chat.messages,
            tools: None,
            add_generation_prompt: chat.add_generation_prompt,
            continue_final_message: chat.continue_final_message,
            bos_token: model.tokenizer.bos_text(),
            eos_token: model.tokenizer.eos_text(),
            extra: chat.template_kwargs.as_ref(),
        })
        .map_err(|e| text_error("messages", &e))?;
    refuse_hopeless(model, rendered.text.len(), "messages")?;
    let encoded = model
        .tokenizer
        .encode_rendered(&rendered, chat.add_special_tokens);
    encoded.map_err(|e| text_error("messages", &e))
}

fn text_error(param: &str, e: &TextError) -> ApiError {
    ApiError::field(param, e.to_string())
}

/// Refuses a text that is too long whatever its tokens are, before any work is spent on it: every
/// token stands for at most `max_token_bytes` bytes.
fn refuse_hopeless(model: &ServedModel, bytes: usize, param: &str) -> Result<(), ApiError> {
    let most = (model.max_model_len as usize).saturating_mul(model.tokenizer.max_token_bytes());
    if bytes <= most {
        return Ok(());
    }
    Err(ApiError::context_length(
        param,
        format!(
            "the context holds {} tokens, which are at most {most} bytes of text; this text has {bytes}",
            model.max_model_len
        ),
    ))
}

/// Bytes of all strings in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(map) => map.values().map(text_bytes).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}
