//! Every choice that is a matter of taste, in one place. The rest of the crate is mechanism.
//!
//! - **Order**: lower priority value first, then first come, first served ([`Rank`]'s order). A
//!   waiting sequence never overtakes one of its priority: when the head of the line cannot start,
//!   nobody does.
//! - **A step**: running decodes first, each one token; what is left of the token budget goes to
//!   prompts, oldest first, cut into chunks; then to sequences that start.
//! - **Memory**: a sequence starts when the pool has its whole prompt and a small reserve. When a
//!   running one can't grow, the last in line gives its blocks up and waits in line again (it is
//!   recomputed later, mostly from the prefix cache). The first in line is never a victim, so it
//!   always progresses.
//! - **Lanes**: see [`lane`].

use std::collections::BTreeMap;

use spate_executor::{Capacity, Lane, LocalKv};
use spate_kvcache::PrefixMatch;

use crate::sequence::{Rank, Sequence};

/// Blocks that stay available when a sequence starts, so that the running ones can grow for a while
/// before somebody must be preempted: 1 % of the pool, at least one.
pub(crate) fn reserve_blocks(total: u32) -> u32 {
    total.div_ceil(100)
}

/// Blocks that must be available, or found in the prefix index, for a sequence to start: its tokens
/// and the reserve, but never more than it can come to need (it must be able to start alone).
pub(crate) fn blocks_to_start(seq: &Sequence, capacity: &Capacity) -> u32 {
    let now = seq.len().div_ceil(capacity.block_size);
    let lifetime = (seq.limit - 1).div_ceil(capacity.block_size);
    (now + reserve_blocks(capacity.blocks)).min(lifetime)
}

/// The same in the pool of layers with a sliding window, beside the blocks that were found there: all
/// its tokens, or what the largest step needs of it.
pub(crate) fn local_blocks_to_start(
    seq: &Sequence,
    capacity: &Capacity,
    found: &PrefixMatch,
) -> u32 {
    let (size, tokens) = (capacity.block_size, capacity.max_batch_tokens);
    capacity.local.map_or(0, |local| {
        let step = LocalKv::least_blocks(local.window, size, tokens) - found.local_len();
        (seq.len().div_ceil(size) - found.len()).min(step)
    })
}

/// Positions of a prompt that make a step of decodes last about three times as long (on an H100).
const LONG_PROMPT: u32 = 512;

/// Where a sequence with `uncached` positions to compute starts.
///
/// With nothing decoding, a prompt may take the whole device. A short prompt is fused with the
/// decodes. A long one, which would make them wait, goes beside them if the executor can do that.
pub(crate) fn lane(uncached: u32, decoding: bool, capacity: &Capacity) -> Lane {
    let long = uncached > LONG_PROMPT.min(capacity.max_batch_tokens / 2);
    if long && decoding && capacity.lanes.contains(&Lane::Prefill) {
        Lane::Prefill
    } else {
        Lane::Main
    }
}

/// Who gives its blocks up for `needy`: the last in line, if that is behind it.
pub(crate) fn victim(running: &BTreeMap<Rank, Sequence>, needy: Rank) -> Option<Rank> {
    running
        .keys()
        .next_back()
        .copied()
        .filter(|&last| last > needy)
}
