//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::app::App;
use crate::body::JsonObject;
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::prepare::{encode_chat, encode_text};
use crate::routes::chat::read_chat_prompt;
use crate::routes::completions::read_token_ids;

pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let context = app.context()?;
    let model = context.model.clone();
    let fields = &mut Fields::new(map);
    model.resolve_name(fields.string("model")?)?;
    let with_strings = fields.bool("return_token_strs")?.unwrap_or(false);
    let chat = match fields.has("messages") {
        true => Some(read_chat_prompt(fields)?),
        false => None,
    };
    let prompt = fields.string("prompt")?;
    let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
    fields.log_unknown();
    let work = move || match (chat, prompt) {
        (Some(chat), None) => encode_chat(&model, &chat),
        (None, Some(text)) => encode_text(&model, &text, add_special_tokens),
        _ => Err(ApiError::field(
            "prompt",
            "exactly one of 'prompt' and 'messages' is required",
        )),
    };
    let tokens = app.run_text_work(work).await?;
    let mut response = json!({
        "count": tokens.len(),
        "max_model_len": context.model.max_model_len,
        "tokens": tokens,
    });
    if with_strings {
        let text = |&id| String::from_utf8_lossy(context.model.tokenizer.token_bytes(id));
        response["token_strs"] = tokens.iter().map(text).collect();
    }
    Ok(Json(response))
}

pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    JsonObject(map): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let context = app.context()?;
    let model = context.model;
    let mut fields = Fields::new(map);
    model.resolve_name(fields.string("model")?)?;
    let Some(tokens) = fields.array("tokens")? else {
        return Err(ApiError::field("tokens", "'tokens' is required"));
    };
    let tokens = read_token_ids("tokens", &tokens, model.vocab_size())?;
    fields.log_unknown();
    let text = app
        .run_text_work(move || model.tokenizer.decode(&tokens, false))
        .await;
    Ok(Json(json!({"prompt": text})))
}
