//! The nouns shared by every crate of Spate; no logic beyond what keeps a value valid.
//!
//! Everything here is plain data that crosses a crate boundary: the request as the engine sees it
//! ([`GenerationRequest`]), the ids that name things, and what comes back ([`SampledToken`],
//! [`FinishReason`], [`Usage`]).

mod ids;
mod output;
mod request;

pub use ids::{BlockId, BlockIds, LocalBlocks, RequestId, SeqId, Slot, TokenId};
pub use output::{FinishReason, Logprobs, SampledToken, Timings, Usage};
pub use request::{GenerationRequest, SamplingParams, StopParams};

/// A point in time or a span, in microseconds since an origin that its owner chose.
///
/// The scheduler has no clock: whoever calls it passes the time in, so that a simulator can pass
/// virtual time.
pub type Micros = u64;
