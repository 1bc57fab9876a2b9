use crate::{Micros, TokenId};

/// A token that the executor chose.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// The chosen token.
    pub token: TokenId,
    /// Present when [`crate::SamplingParams::logprobs`] asked for it.
    pub logprobs: Option<Box<Logprobs>>,
}

/// Log-probabilities (natural log) at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// The token at this position: sampled, or the prompt's own.
    pub token: TokenId,
    /// Its log-probability.
    pub logprob: f32,
    /// Its rank, 1 for the most likely.
    pub rank: u32,
    /// The most likely tokens, best first (the lower id first among equals), as many as were asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a sequence ended. Every admitted sequence ends exactly once, with one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model ended the sequence (`None`), or one of the client's stop ids was sampled, or (told
    /// by the caller) a stop string matched.
    Stop(Option<TokenId>),
    /// `max_tokens` or the context length was reached.
    Length,
    /// The client went away or asked for the end.
    Abort,
    /// The request's deadline passed.
    Deadline,
    /// The executor failed this sequence alone (non-finite logits).
    Error,
}

/// Token counts of a finished request, as billed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt, counted once whatever `n` is.
    pub prompt_tokens: u32,
    /// Of those, tokens whose KV came from the prefix cache when the request first ran.
    pub cached_tokens: u32,
    /// Output tokens of all `n` sequences, the stop token included.
    pub completion_tokens: u32,
}

/// When things happened to a request, all on the engine's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// The engine took the request in.
    pub arrived: Micros,
    /// Its first step was planned; 0 if it never ran.
    pub scheduled: Micros,
    /// Its first output token was committed; 0 if there was none.
    pub first_token: Micros,
    /// Its last sequence ended.
    pub finished: Micros,
    /// Times one of its sequences was preempted.
    pub preemptions: u32,
}
