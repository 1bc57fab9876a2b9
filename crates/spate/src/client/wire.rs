//! The parts of OpenAI's answers that are read here. Typed, so that a chunk costs one pass over its
//! bytes; fields that nobody reads are skipped, fields that a server leaves out have a default.

use serde::Deserialize;

/// `GET /v1/models`.
#[derive(Debug, Deserialize)]
pub(super) struct Models {
    pub(super) data: Vec<Model>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Model {
    pub(super) id: String,
}

/// A chunk of `/v1/completions` or `/v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct Chunk {
    #[serde(default)]
    pub(crate) choices: Vec<Choice>,
    pub(crate) usage: Option<Usage>,
    pub(super) error: Option<ErrorBody>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Choice {
    /// Completions.
    text: Option<String>,
    /// Chat.
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
}

impl Choice {
    /// The new text, of either endpoint.
    pub(crate) fn text(&self) -> &str {
        let content = self
            .delta
            .as_ref()
            .and_then(|delta| delta.content.as_deref());
        self.text.as_deref().or(content).unwrap_or_default()
    }

    /// Says only that the answer is over.
    pub(crate) fn is_end_only(&self) -> bool {
        self.finish_reason.is_some() && self.text().is_empty()
    }
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

impl Usage {
    /// Prompt tokens that the server did not have to compute.
    pub(crate) fn cached_tokens(&self) -> u64 {
        let details = self.prompt_tokens_details.unwrap_or_default();
        details.cached_tokens.unwrap_or(0)
    }
}

/// The body of a refused request.
#[derive(Debug, Deserialize)]
pub(super) struct ErrorAnswer {
    pub(super) error: ErrorBody,
}

/// OpenAI's error object, or the bare text that some servers send.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum ErrorBody {
    Object { message: String },
    Text(String),
}

impl ErrorBody {
    pub(super) fn into_message(self) -> String {
        match self {
            Self::Object { message } | Self::Text(message) => message,
        }
    }
}
