//! What can go wrong between us and a server, in the kinds that `bench` counts.

use std::error::Error;
use std::io;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nothing was sent: the URL or the key is unusable.
    #[error("{0}")]
    Setup(String),
    #[error("can't connect to {authority} ({source}); is the server running?")]
    Connect {
        authority: String,
        source: io::Error,
    },
    /// The server refused the request.
    #[error("HTTP {status}: {message}")]
    Status { status: u16, message: String },
    #[error("the connection broke: {0}")]
    Broken(#[source] Box<dyn Error + Send + Sync>),
    /// The body ended, properly as HTTP goes, but without `[DONE]`.
    #[error("the stream ended without [DONE]")]
    Unfinished,
    /// The server sent an error object within the stream.
    #[error("the server gave up: {0}")]
    Stream(String),
    #[error("not what an OpenAI server answers: {0}")]
    Malformed(String),
}

impl ClientError {
    pub(super) fn broken(e: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Broken(e.into())
    }

    /// A short name without details of the one request, to count by.
    pub(crate) fn kind(&self) -> String {
        let kind = match self {
            Self::Status { status, .. } => return format!("HTTP {status}"),
            Self::Setup(_) => "setup",
            Self::Connect { .. } => "can't connect",
            Self::Broken(_) => "connection broke",
            Self::Unfinished => "unfinished stream",
            Self::Stream(_) => "error in stream",
            Self::Malformed(_) => "malformed answer",
        };
        kind.to_owned()
    }
}
