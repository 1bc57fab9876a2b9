use std::sync::Arc;
use std::time::Duration;

use spate_types::{
    BlockId, BlockIds, LocalBlocks, Logprobs, SampledToken, SamplingParams, Slot, TokenId,
};

/// A queue of steps on the device that runs in order. Different lanes run side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Decodes, and prompt chunks fused with them.
    Main,
    /// Long prompts, beside running decodes.
    Prefill,
}

/// Names a submitted batch; unique per executor, ascending in order of submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ticket(pub u64);

/// One step: block copies, then rows.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Copy-on-write copies, done before any row runs.
    pub copies: Vec<BlockCopy>,
    /// The same in the pool of the layers with a sliding window.
    pub local_copies: Vec<BlockCopy>,
    /// At least one; no slot twice. No two rows write the same block.
    pub rows: Vec<Row>,
}

/// Copies a whole KV block, in every layer of its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Read.
    pub src: BlockId,
    /// Overwritten.
    pub dst: BlockId,
}

/// One sequence's share of a step.
#[derive(Debug, Clone)]
pub struct Row {
    /// Where the sequence lives.
    pub slot: Slot,
    /// Present on the sequence's first row only: resets everything the slot held.
    pub bind: Option<Bind>,
    /// Position of the first input token. KV of positions `0 .. start` is in `blocks` already.
    pub start: u32,
    /// The input tokens; their KV is written at `start ..`.
    pub input: Input,
    /// Blocks that cover every position up to the last input token; more may follow.
    pub blocks: BlockIds,
    /// Blocks in the pool of the layers with a sliding window, if there is one: they cover what the
    /// first input token sees, and every position from there to the last input token.
    pub local: LocalBlocks,
    /// Choose a token from the logits of the last input position. It becomes the slot's last token
    /// and counts for its penalties.
    pub sample: bool,
    /// Choose only among the tokens of a mask, which comes by [`crate::Executor::mask`] after the
    /// submission. Only for rows that sample.
    pub masked: bool,
    /// Report logprobs of the prompt tokens that this row's positions predict
    /// (`start + 1 ..= start + len`, as far as the prompt reaches).
    pub prompt_logprobs: bool,
}

/// Tokens that may be chosen: bit `t % 32` of word `t / 32` says it of token `t`.
pub type TokenMask = Arc<[u32]>;

/// What a slot is told about its sequence.
#[derive(Debug, Clone)]
pub struct Bind {
    /// The whole prompt: repetition penalties count it, and cached parts of it never come as input.
    pub prompt: Arc<[TokenId]>,
    /// How to sample.
    pub sampling: Arc<SamplingParams>,
    /// Key of the random stream: the request's seed plus the sequence's index.
    pub seed: u64,
}

/// Input tokens of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// These, at least one.
    Tokens(Vec<TokenId>),
    /// The one token sampled last for this slot, which may still be in flight.
    Last,
}

impl Input {
    /// Number of positions.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        match self {
            Input::Tokens(tokens) => tokens.len(),
            Input::Last => 1,
        }
    }
}

impl Row {
    /// Position after the last input token: the position of the token it samples.
    pub fn end(&self) -> u32 {
        self.start + self.input.len() as u32
    }
}

/// A finished step.
#[derive(Debug, Clone)]
pub struct Completion {
    /// Which.
    pub ticket: Ticket,
    /// One per row, in the order of the batch.
    pub outputs: Vec<RowOutput>,
    /// How long the device worked on it.
    pub busy: Duration,
}

/// What a row gave.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowOutput {
    /// Present when the row asked for a sample and did not fail.
    pub sampled: Option<SampledToken>,
    /// In position order, when the row asked for it.
    pub prompt_logprobs: Vec<Logprobs>,
    /// The logits were not finite: this sequence has failed, its KV must not be shared.
    pub failed: bool,
}
