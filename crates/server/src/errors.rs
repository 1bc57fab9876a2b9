//! The one error of the HTTP surface: OpenAI's error object with its status code.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use spate_engine::{AddError, AdmitError, SubmitError};

/// What a client is told when its request fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The request field at fault.
    pub(crate) param: Option<String>,
    /// Machine-readable cause.
    pub(crate) code: Option<&'static str>,
    /// Seconds after which another try may succeed.
    pub(crate) retry_after: Option<u32>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// 400.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400 that names the field at fault.
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::bad_request(message)
        }
    }

    /// 400: the field is known, but what it asks for does not exist here.
    pub(crate) fn unsupported(param: &str) -> Self {
        Self::field(param, format!("'{param}' is not supported yet"))
            .with_code("unsupported_parameter")
    }

    /// 400: more tokens than the model's context.
    pub(crate) fn context_length(param: &str, message: impl Into<String>) -> Self {
        Self::field(param, message).with_code("context_length_exceeded")
    }

    /// 503 that asks to come again.
    pub(crate) fn unavailable(message: impl Into<String>, retry_after: u32) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_retry_after(retry_after)
    }

    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub(crate) fn with_retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The JSON error object, as it stands in a body or in a server-sent event.
    pub(crate) fn body(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Envelope<'a> {
            error: Object<'a>,
        }
        #[derive(Serialize)]
        struct Object<'a> {
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: Option<&'a str>,
        }
        let envelope = Envelope {
            error: Object {
                message: &self.message,
                r#type: self.kind(),
                param: self.param.as_deref(),
                code: self.code,
            },
        };
        serde_json::to_vec(&envelope).expect("plain strings serialise")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body()).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<AdmitError> for ApiError {
    fn from(e: AdmitError) -> Self {
        match e {
            AdmitError::QueueFull { .. } => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{e}; try again later"),
            )
            .with_code("queue_full")
            .with_retry_after(1),
            AdmitError::Draining => Self::unavailable(e.to_string(), 5).with_code("draining"),
            AdmitError::Dead(_) => Self::unavailable(e.to_string(), 10).with_code("engine_dead"),
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(e: SubmitError) -> Self {
        match &e {
            SubmitError::Dead(_) => Self::unavailable(e.to_string(), 10).with_code("engine_dead"),
            SubmitError::Invalid(AddError::QueueFull) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, e.to_string())
                    .with_code("queue_full")
                    .with_retry_after(1)
            }
            SubmitError::Invalid(AddError::PromptTooLong { .. } | AddError::NeedsMoreKv { .. }) => {
                Self::bad_request(e.to_string()).with_code("context_length_exceeded")
            }
            SubmitError::Invalid(AddError::Invalid(_)) => Self::bad_request(e.to_string()),
        }
    }
}
