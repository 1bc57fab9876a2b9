//! The routes and the layers around them.

mod chat;
mod completions;
mod health;
mod models;
mod tokenize;

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{StatusCode, header};
use spate_types::{SampledToken, TokenId};
use tower_http::catch_panic::CatchPanicLayer;

use crate::access_log::log_access;
use crate::app::{App, Context, unix_time};
use crate::auth::require_key;
use crate::dto::logprobs::TokenWriter;
use crate::dto::{Head, Usage};
use crate::errors::ApiError;
use crate::generation::Generation;
use crate::validate::ValidatedRequest;

/// Everything behind the port.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/v1/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/readyz", get(health::ready))
        .route("/ping", get(health::ready))
        .route("/health/live", get(health::live))
        .route("/livez", get(health::live))
        .route("/version", get(health::version))
        .route("/metrics", get(health::metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        // The last layer is the outermost.
        .layer(CatchPanicLayer::custom(internal_error))
        .layer(from_fn_with_state(app.clone(), limit_head))
        .layer(from_fn_with_state(app.clone(), require_key))
        .layer(from_fn_with_state(app.clone(), log_access))
        .layer(from_fn(error_objects))
        .with_state(app)
}

async fn not_found() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is no such route").with_code("not_found")
}

async fn method_not_allowed() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "the route does not take this method",
    )
}

fn internal_error(panic: Box<dyn Any + Send>) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(
        panic = message.escape_debug().to_string(),
        "a handler panicked"
    );
    ApiError::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "an error inside the server; its log says more",
    )
    .into_response()
}

/// Refuses request heads beyond the configured limits.
async fn limit_head(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    // What a line is on the wire: name, colon, space, value, line break.
    let bytes: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    if headers.len() > app.config.max_headers || bytes > app.config.max_header_bytes {
        let message = format!(
            "the request has {} headers with {bytes} bytes; {} with {} bytes are accepted",
            headers.len(),
            app.config.max_headers,
            app.config.max_header_bytes
        );
        return ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message).into_response();
    }
    next.run(request).await
}

/// Gives an error object to errors that the framework answers with plain text.
async fn error_objects(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if !is_error || is_json {
        return response;
    }
    let message = status.canonical_reason().unwrap_or("request failed");
    ApiError::new(status, message).into_response()
}

/// What all chunks and choices of a response have in common.
fn head(context: &Context, request: &ValidatedRequest, id: String, object: &'static str) -> Head {
    Head {
        id,
        object,
        created: unix_time(),
        model: request.model.clone(),
        system_fingerprint: context.model.fingerprint.clone(),
    }
}

/// The usage field of a streamed chunk that is not the last.
fn chunk_usage(request: &ValidatedRequest, generation: &Generation) -> Option<Option<Usage>> {
    let options = request.stream.unwrap_or_default();
    match (options.include_usage, options.continuous_usage) {
        (_, true) => Some(Some(generation.usage())),
        (true, false) => Some(None),
        (false, false) => None,
    }
}

/// How tokens are written in this response's logprobs.
fn token_writer<'a>(generation: &'a Generation, request: &ValidatedRequest) -> TokenWriter<'a> {
    TokenWriter {
        tokenizer: generation.tokenizer(),
        as_ids: request.output.tokens_as_ids,
    }
}

/// The ids of output tokens, when the client wants them.
fn token_ids(request: &ValidatedRequest, tokens: &[SampledToken]) -> Option<Vec<TokenId>> {
    let ids = || tokens.iter().map(|token| token.token).collect();
    request.output.token_ids.then(ids)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    #[tokio::test]
    async fn a_panic_is_a_500_with_an_error_object() {
        async fn panics() {
            panic!("secret detail");
        }
        let router: Router = Router::new()
            .route("/", get(panics))
            .layer(CatchPanicLayer::custom(internal_error));
        let response = router
            .oneshot(Request::new(axum::body::Body::empty()))
            .await
            .unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"]["type"], "server_error");
        assert!(!body.to_string().contains("secret"));
    }
}
