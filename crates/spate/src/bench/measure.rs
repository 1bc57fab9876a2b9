//! One request on the stop-watch.

use std::time::{Duration, Instant};

use super::workload::Planned;
use crate::client::{Chunk, Client, ClientError, Usage};

/// One finished request. Times are from just before it was sent; they include connecting, where no
/// connection was idle.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample {
    /// To the first chunk with output.
    pub(super) ttft: Duration,
    /// To the last chunk with output.
    pub(super) e2e: Duration,
    /// Between one chunk with output and the next.
    pub(super) gaps: Vec<Duration>,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) asked_tokens: u64,
    /// Whether the server counted the tokens. Otherwise `output_tokens` counts chunks.
    pub(super) has_usage: bool,
}

impl Sample {
    /// Chunks with output.
    pub(super) fn chunks(&self) -> u64 {
        self.gaps.len() as u64 + 1
    }
}

pub(super) type Outcome = Result<Sample, ClientError>;

/// Sends one request and follows its stream.
pub(super) async fn measure(client: &Client, request: Planned) -> Outcome {
    let start = Instant::now();
    let mut stream = client.stream("/v1/completions", request.body).await?;
    let mut arrivals = Vec::with_capacity(request.output_len as usize);
    let mut usage: Option<Usage> = None;
    while let Some(event) = stream.next().await? {
        if has_output(&event.chunk) {
            arrivals.push(event.at);
        }
        usage = event.chunk.usage.or(usage);
    }
    let (Some(&first), Some(&last)) = (arrivals.first(), arrivals.last()) else {
        return Err(ClientError::Malformed(
            "the stream brought no output".into(),
        ));
    };
    let counted = usage.unwrap_or_default();
    let chunks = arrivals.len() as u64;
    Ok(Sample {
        ttft: first - start,
        e2e: last - start,
        gaps: arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        prompt_tokens: counted.prompt_tokens,
        cached_tokens: counted.cached_tokens(),
        output_tokens: usage.map_or(chunks, |usage| usage.completion_tokens),
        asked_tokens: request.output_len.into(),
        has_usage: usage.is_some(),
    })
}

/// A chunk without text still counts if the answer goes on: it stands for a token whose character
/// is not complete, or has no text.
fn has_output(chunk: &Chunk) -> bool {
    chunk
        .choices
        .first()
        .is_some_and(|choice| !choice.is_end_only())
}
