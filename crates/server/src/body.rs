//! Reading a JSON request body within bounds of size and time.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use tokio::time::timeout;

use crate::app::App;
use crate::errors::ApiError;
use crate::json;

/// Bodies beyond this size are parsed off the I/O threads.
const PARSE_INLINE_BYTES: usize = 64 << 10;
/// How long the rest of a refused body is read and thrown away: a client that is still sending
/// would otherwise meet a reset connection instead of the answer.
const LINGER: Duration = Duration::from_secs(1);

/// The JSON object that a request brought.
pub(crate) struct JsonObject(pub(crate) Map<String, Value>);

impl FromRequest<Arc<App>> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let (head, mut body) = request.into_parts();
        let bytes = match read(app, &head.headers, &mut body).await {
            Ok(bytes) => bytes,
            Err(e) => {
                discard(body, app.config.max_body_bytes).await;
                return Err(e);
            }
        };
        let parsed = match bytes.len() > PARSE_INLINE_BYTES {
            true => app.run_text_work(move || json::parse_object(&bytes)).await,
            false => json::parse_object(&bytes),
        };
        parsed.map(Self)
    }
}

async fn read(app: &App, headers: &HeaderMap, body: &mut Body) -> Result<Bytes, ApiError> {
    check_content_type(headers)?;
    let limit = app.config.max_body_bytes;
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request body is larger than {limit} bytes"),
        )
    };
    let declared = headers.get(header::CONTENT_LENGTH);
    let declared = declared.and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let collect = async {
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame
                .map_err(|e| ApiError::bad_request(format!("the request body broke off: {e}")))?;
            let Ok(data) = frame.into_data() else {
                continue; // trailers
            };
            if data.len() > limit - bytes.len() {
                return Err(too_large());
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes.freeze())
    };
    let within = app.config.body_timeout;
    timeout(within, collect).await.unwrap_or_else(|_| {
        Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!(
                "the request body did not arrive within {} s",
                within.as_secs_f32()
            ),
        ))
    })
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused = |message| Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
    if !is_json {
        return refused("the request needs the header 'Content-Type: application/json'");
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(coding) if !coding.as_bytes().eq_ignore_ascii_case(b"identity") => {
            refused("compressed request bodies are not accepted")
        }
        _ => Ok(()),
    }
}

async fn discard(mut body: Body, limit: usize) {
    let mut left = limit;
    let throw_away = async {
        while let Some(Ok(frame)) = body.frame().await {
            let len = frame.data_ref().map_or(0, Bytes::len);
            left = left.saturating_sub(len);
            if left == 0 {
                return;
            }
        }
    };
    // Late or not, the answer comes next.
    let _late = timeout(LINGER, throw_away).await;
}
