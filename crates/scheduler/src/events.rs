use spate_types::{FinishReason, Logprobs, RequestId, SampledToken, SeqId, Timings, Usage};

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Too many sequences wait already. Try again later.
    #[error("the waiting line is full; try again later")]
    QueueFull,
    /// The prompt leaves no room for an output token.
    #[error("the prompt has {len} tokens; at most {max} leave room for an output token")]
    PromptTooLong {
        /// Tokens of the prompt.
        len: usize,
        /// Most tokens a prompt may have.
        max: usize,
    },
    /// Even alone, a sequence of this request would not fit into the KV pool.
    #[error(
        "prompt and max_tokens need KV cache for {need_tokens} tokens, the whole pool has \
         {have_tokens}; lower max_tokens or shorten the prompt"
    )]
    NeedsMoreKv {
        /// Positions that one sequence may come to hold.
        need_tokens: usize,
        /// Positions in the pool.
        have_tokens: usize,
    },
    /// The request breaks a rule of [`spate_types::GenerationRequest`].
    #[error("invalid request: {0}")]
    Invalid(&'static str),
}

/// Something that happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A sequence has a new output token.
    Token {
        /// Whose.
        seq: SeqId,
        /// The token, with logprobs if they were asked for.
        token: SampledToken,
    },
    /// Logprobs of prompt tokens 1, 2, …: each exactly once, in order, possibly over several events.
    PromptLogprobs {
        /// Whose.
        request: RequestId,
        /// The next ones.
        logprobs: Vec<Logprobs>,
    },
    /// A sequence ended. Exactly once, after its last token.
    Finished {
        /// Which.
        seq: SeqId,
        /// Why.
        reason: FinishReason,
    },
    /// All sequences of a request ended. Exactly once, after the last `Finished`.
    Done {
        /// Which.
        request: RequestId,
        /// Token counts.
        usage: Usage,
        /// When things happened.
        timings: Timings,
    },
}

/// Gauges of this moment and counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Sequences that hold KV blocks and take part in steps.
    pub running: u32,
    /// Sequences that wait for their first step, or for their next one after a preemption.
    pub waiting: u32,
    /// KV blocks in the pool.
    pub blocks_total: u32,
    /// KV blocks held by sequences.
    pub blocks_used: u32,
    /// KV blocks held by nothing but the prefix index.
    pub blocks_cached: u32,
    /// Blocks in the pool of layers with a window; 0 if there is none.
    pub local_blocks_total: u32,
    /// Of those, blocks held by sequences.
    pub local_blocks_used: u32,
    /// Rows submitted and not yet committed.
    pub in_flight_rows: u32,
    /// Tokens looked up in the prefix index when sequences first started.
    pub prefix_queries_tokens: u64,
    /// Of those, tokens found.
    pub prefix_hit_tokens: u64,
    /// Times a running sequence had to give its blocks up.
    pub preemptions: u64,
    /// Prompt tokens of the requests that started.
    pub prompt_tokens: u64,
    /// Of those, tokens whose KV came from the prefix cache.
    pub cached_prompt_tokens: u64,
    /// Output tokens.
    pub generation_tokens: u64,
    /// Positions computed, recomputed ones included.
    pub computed_tokens: u64,
}
