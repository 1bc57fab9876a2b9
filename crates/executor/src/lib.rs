//! The step contract between the engine and whatever runs the model.
//!
//! An [`Executor`] owns the weights, the KV pool and one *slot* per live sequence. The engine hands
//! it [`Batch`]es and gets [`Completion`]s back. Steps are asynchronous: step N+1 is submitted
//! before step N was read back, so a decode row does not name its input token — it says
//! [`Input::Last`], and the executor feeds the token that it sampled for that slot last.
//!
//! What every implementation guarantees, and the conformance suite checks:
//! - steps of one lane run in the order of submission; copies of a batch run before its rows;
//! - a row's output depends on its own tokens, its sampling parameters and nothing else: not on its
//!   neighbours, on how its prompt was cut into chunks, or on which blocks hold its KV;
//! - a bad batch is refused whole by [`Executor::submit`] before anything runs.

mod batch;
pub mod conformance;
mod contract;
mod error;
mod pools;
mod sim;

pub use batch::{
    Batch, Bind, BlockCopy, Completion, Input, Lane, Row, RowOutput, Ticket, TokenMask,
};
pub use contract::Contract;
pub use error::ExecutorError;
pub use pools::KvMemory;
pub use sim::{SimConfig, SimExecutor};

use std::time::Instant;

use spate_types::Slot;

/// The second KV pool of a model some of whose layers see only a window of the last positions. Those
/// layers keep their KV here, the others in the main pool; a sequence holds as many blocks here as
/// its window and the step's input take, however long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalKv {
    /// Positions that a query sees, its own included; at least 1.
    pub window: u32,
    /// Blocks in the pool, of `block_size` tokens as in the main one; at least
    /// [`LocalKv::least_blocks`].
    pub blocks: u32,
}

impl LocalKv {
    /// What one sequence needs for the largest step of `max_batch_tokens` tokens.
    pub fn least_blocks(window: u32, block_size: u32, max_batch_tokens: u32) -> u32 {
        // One more, because window and step may begin and end within blocks.
        window.saturating_add(max_batch_tokens).div_ceil(block_size) + 1
    }

    /// The first of a sequence's blocks that holds a position seen from `position`.
    pub fn first_seen(&self, position: u32, block_size: u32) -> u32 {
        (position + 1).saturating_sub(self.window) / block_size
    }
}

/// What an executor can hold; fixed from its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity {
    /// Sequences that can be alive at once (running or preempted).
    pub slots: u32,
    /// KV blocks in the pool.
    pub blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// The pool of the layers with a sliding window, if they have their own.
    pub local: Option<LocalKv>,
    /// Most input tokens in one batch, over all rows.
    pub max_batch_tokens: u32,
    /// Input tokens that a step computes in about the time that it takes for one, because reading the
    /// weights takes as long. `None` where each token takes its own time.
    pub step_tokens: Option<u32>,
    /// Most positions in one sequence.
    pub max_seq_len: u32,
    /// Width of the logits: every token id is below it.
    pub vocab_size: u32,
    /// Lanes that take batches.
    pub lanes: Vec<Lane>,
    /// Batches that may be submitted on a lane and not yet be completed; at least 1.
    pub depth: u32,
}

/// Runs batches on a device.
///
/// One thread, the engine's, calls it; an implementation does its work elsewhere (a stream, a
/// worker thread) so that [`submit`](Self::submit) returns at once.
pub trait Executor: Send {
    /// What it can hold.
    fn capacity(&self) -> &Capacity;

    /// Queues `batch` behind everything submitted on `lane` before.
    ///
    /// # Errors
    /// [`ExecutorError::Rejected`] when the batch breaks a rule of [`Batch`] or exceeds the
    /// capacity: nothing of it runs. [`ExecutorError::Fatal`] when the device is lost.
    fn submit(&mut self, lane: Lane, batch: Batch) -> Result<Ticket, ExecutorError>;

    /// Gives the masks of a batch's masked rows, in their order, once. The forward pass does not wait for
    /// them, only the choice of tokens does: a mask may depend on the token of the step before, which
    /// comes back while this one runs. Batches may be submitted behind one that has no masks yet;
    /// without them neither ever completes.
    ///
    /// # Errors
    /// [`ExecutorError::Rejected`] when the batch is not in flight, waits for no masks or for another
    /// number of them, or when one has not a bit per token or allows none. [`ExecutorError::Fatal`] when
    /// the device is lost.
    fn mask(&mut self, ticket: Ticket, masks: Vec<TokenMask>) -> Result<(), ExecutorError>;

    /// Waits until `deadline` for the next completion, in order of submission within each lane.
    /// `None`: there was none by then.
    ///
    /// # Errors
    /// [`ExecutorError::Fatal`] when the device is lost: no completion will come any more.
    fn wait(&mut self, deadline: Instant) -> Result<Option<Completion>, ExecutorError>;

    /// Forgets a slot's state. Called when its sequence ended and no batch in flight names it.
    fn release(&mut self, slot: Slot);
}
