use std::sync::Arc;

use spate_executor::Lane;
use spate_kvcache::BlockTable;
use spate_types::{FinishReason, GenerationRequest, SeqId, Slot, TokenId};

/// A sequence's place in line, which is also its name: lower priority values first, then first
/// come, first served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Rank {
    pub(crate) priority: i32,
    pub(crate) arrival: u64,
    pub(crate) index: u32,
}

/// One of the `n` continuations of a prompt.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) request: Arc<GenerationRequest>,
    /// The prompt, then the output tokens that came back.
    pub(crate) tokens: Vec<TokenId>,
    /// Most tokens that `tokens` may come to hold: by `max_tokens` or the context length.
    pub(crate) limit: u32,
    /// Empty unless running.
    pub(crate) table: BlockTable,
    /// Taken at the first start, kept to the end.
    pub(crate) slot: Option<Slot>,
    /// The slot's bind was planned.
    pub(crate) bound: bool,
    pub(crate) lane: Lane,
    /// KV of positions `0 .. planned` is written once everything in flight is done.
    pub(crate) planned: u32,
    /// KV of positions `0 .. committed` is written.
    pub(crate) committed: u32,
    /// Output tokens in flight.
    pub(crate) pending: u32,
    /// Rows in flight.
    pub(crate) in_flight: u32,
    /// Number of the newest step with a row of this sequence.
    pub(crate) last_step: u64,
}

impl Sequence {
    pub(crate) fn new(request: &Arc<GenerationRequest>, index: u32, max_len: u32) -> Self {
        let prompt_len = request.prompt.len() as u32; // checked by `Scheduler::validate`
        Self {
            id: SeqId {
                request: request.id,
                index,
            },
            tokens: request.prompt.to_vec(),
            limit: prompt_len
                .saturating_add(request.stop.max_tokens)
                .min(max_len),
            request: Arc::clone(request),
            table: BlockTable::default(),
            slot: None,
            bound: false,
            lane: Lane::Main,
            planned: 0,
            committed: 0,
            pending: 0,
            in_flight: 0,
            last_step: 0,
        }
    }

    pub(crate) fn prompt_len(&self) -> u32 {
        self.request.prompt.len() as u32
    }

    /// Tokens, those in flight included.
    pub(crate) fn len(&self) -> u32 {
        self.tokens.len() as u32 + self.pending
    }

    /// Positions to compute before the next token can be sampled; 0 when no more may be sampled.
    pub(crate) fn remaining(&self) -> u32 {
        if self.len() < self.limit {
            self.len() - self.planned
        } else {
            0
        }
    }

    /// Whether the last of `tokens` ends the sequence.
    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        let last = *self.tokens.last()?;
        if self.request.stop.eos_ids.contains(&last) {
            return Some(FinishReason::Stop(None));
        }
        if self.request.stop.token_ids.contains(&last) {
            return Some(FinishReason::Stop(Some(last)));
        }
        (self.tokens.len() as u32 >= self.limit).then_some(FinishReason::Length)
    }
}
