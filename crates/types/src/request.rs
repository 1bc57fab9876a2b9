use std::sync::Arc;

use crate::{Micros, RequestId, TokenId};

/// One request, validated and tokenized, as the engine takes it.
#[derive(Debug, Clone)]
pub struct GenerationRequest {
    /// Unique in the process.
    pub id: RequestId,
    /// The prompt; never empty, every id below the vocabulary size.
    pub prompt: Arc<[TokenId]>,
    /// How tokens are chosen. Shared with the executor, which keeps it for the life of the slot.
    pub sampling: Arc<SamplingParams>,
    /// When a sequence ends.
    pub stop: Arc<StopParams>,
    /// Sequences to generate from the one prompt, at least 1. Sequence `i` samples with
    /// `sampling.seed + i` (wrapping).
    pub n: u32,
    /// Lower runs earlier; equal priorities run first come, first served.
    pub priority: i32,
    /// Requests with different salts never share cached KV blocks.
    pub cache_salt: Option<Arc<str>>,
    /// The request fails with [`crate::FinishReason::Deadline`] when it has not ended by then.
    /// Same origin as the `now` that the scheduler is given.
    pub deadline: Option<Micros>,
}

/// How the next token is chosen from the logits. Field names and meanings are OpenAI's and vLLM's.
///
/// Order of application: `logit_bias`, stop ids masked below `min_tokens`, repetition penalty,
/// presence and frequency penalties, then (unless greedy) temperature, top-k, top-p, min-p, draw.
/// Reported logprobs are of the unmodified distribution, log-softmax of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy: the highest logit, the lowest token id among equals.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose mass reaches `top_p`, in (0, 1].
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the most likely one, in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in the prompt or the output
    /// (Keskar et al. 2019, CTRL); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens seen in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to single logits. Ids are unique and below the vocabulary size.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the counter-based random stream. Token at position `p` is drawn with the counter `p`,
    /// so a draw depends on nothing but the seed and the position.
    pub seed: u64,
    /// `Some(k)`: report the chosen token's logprob and the `k` most likely alternatives.
    pub logprobs: Option<u32>,
    /// `Some(k)`: the same for each prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// Tokens that can't be chosen before the sequence has `min_tokens` output tokens: the end of
    /// sequence and [`StopParams::token_ids`], unless `ignore_eos` removed them.
    pub min_tokens_banned: Vec<TokenId>,
    /// Output tokens before any of `min_tokens_banned` may be chosen.
    pub min_tokens: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            min_tokens_banned: Vec::new(),
            min_tokens: 0,
        }
    }
}

impl SamplingParams {
    /// Whether a repetition, presence or frequency penalty needs token counts.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// When a sequence ends. Stop *strings* are not here: they are matched on text, outside the engine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopParams {
    /// Output tokens after which the sequence ends with [`crate::FinishReason::Length`]; at least 1.
    pub max_tokens: u32,
    /// End-of-sequence ids of the model; empty under `ignore_eos`.
    pub eos_ids: Vec<TokenId>,
    /// Further ids that end the sequence, asked for by the client.
    pub token_ids: Vec<TokenId>,
}
