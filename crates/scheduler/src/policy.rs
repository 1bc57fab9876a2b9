//! Every choice that is a matter of taste, in one place. The rest of the crate is mechanism.
//!
//! - **Order**: lower priority value first, then first come, first served ([`Rank`]'s order). A
//!   waiting sequence never overtakes one of its priority: when the head of the line cannot start,
//!   nobody does.
//! - **A step**: running decodes first, each one token; what is left of the token budget goes to
//!   prompts, oldest first, cut into chunks; then to sequences that start. How large a step may get
//!   beside decodes: see [`step_budget`].
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

/// Prompt tokens that a step may compute for each sequence that decodes in it, beside those that cost
/// next to nothing.
const PROMPT_SHARE: u32 = 2;

/// Largest step while nothing decodes, in [`Capacity::step_tokens`]: so large that fixed costs vanish,
/// so small that first tokens come, and whoever arrives is looked at, every now and then.
const IDLE_STEP: u32 = 8;

/// Most input tokens of a step in which `decodes` sequences decode.
///
/// Prompt tokens that ride along in a step of decodes are cheaper than in a step of their own: up to
/// [`Capacity::step_tokens`] the weights' way from memory takes longer than the arithmetic. Beyond, each
/// takes its time, for which all decodes wait: a larger step brings first tokens earlier and the others
/// further apart, and prompts that are computed in a hurry leave steps behind in which nothing rides
/// along. What is best by the model in `tests/pacing`: two such measures, and another for every
/// so many decodes, as with these more requests end, and as many prompts come. A step
/// that is not a multiple of the measure wastes some of the arithmetic units.
pub(crate) fn step_budget(decodes: u32, capacity: &Capacity) -> u32 {
    let Some(measure) = capacity.step_tokens else {
        return capacity.max_batch_tokens;
    };
    let measures = match decodes {
        0 => IDLE_STEP,
        _ => 1 + (PROMPT_SHARE * decodes).div_ceil(measure),
    };
    capacity
        .max_batch_tokens
        .min(measures.saturating_mul(measure))
}

/// Positions of a prompt that make a step of decodes last about three times as long (on an H100). Only
/// where there is a prefill lane does this matter.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(step_tokens: Option<u32>) -> Capacity {
        Capacity {
            slots: 256,
            blocks: 100,
            block_size: 16,
            local: None,
            max_batch_tokens: 8192,
            step_tokens,
            max_seq_len: 1024,
            vocab_size: 100,
            lanes: vec![Lane::Main],
            depth: 1,
        }
    }

    #[test]
    fn steps_grow_with_the_decodes() {
        let budgets = |measure| {
            let capacity = capacity(measure);
            [0, 1, 128, 129, 256].map(|decodes| step_budget(decodes, &capacity))
        };
        assert_eq!(budgets(Some(256)), [2048, 512, 512, 768, 768]);
        assert_eq!(budgets(Some(128)), [1024, 256, 384, 512, 640]);
        assert_eq!(budgets(None), [8192; 5]);
        assert_eq!(budgets(Some(u32::MAX)), [8192; 5]);
    }

    #[test]
    fn decodes_leave_room_for_prompts() {
        for measure in [1, 3, 128, 256] {
            let capacity = capacity(Some(measure));
            for decodes in 0..2000 {
                assert!(step_budget(decodes, &capacity) > decodes);
            }
        }
    }
}
