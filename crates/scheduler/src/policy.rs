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
use std::ops::RangeInclusive;

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

/// What there is to compute on a lane.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Demand {
    /// Sequences with one position to go.
    pub(crate) decodes: u32,
    /// Positions to compute of all prompts; cached ones count until the prompt starts.
    pub(crate) backlog: u32,
}

/// Prompt tokens for which there should be room, in the long run, for each token of output.
const USUAL_PROMPTS: u32 = 3;

/// Steps in which all prompts should be computed.
const STEPS_FOR_ALL: u32 = 32;

/// Steps with decodes, in measures ([`Capacity::step_tokens`]): on an H100 16 to 30 ms.
const STEP: RangeInclusive<u32> = 2..=4;

/// Largest step without, in measures: so large that fixed costs vanish, so small that first tokens come,
/// and whoever arrives is looked at, every now and then.
const IDLE_STEP: u32 = 8;

/// Most input tokens of the next step.
///
/// Prompt tokens that ride along with decodes are cheaper than in steps of their own, as the weights
/// are read once for both. The larger such a step, the earlier come first tokens and the further
/// apart the others; and prompts that were computed in a hurry are missing later, in steps that have room for
/// them. So a step is as large as it takes to keep up with the prompts that usually come and to make a long
/// line shorter. It is a whole number of measures, as
/// the tiles of matrix products like it.
///
/// By the model in `tests/pacing`, which is near what was measured, other constants are not clearly better.
pub(crate) fn step_budget(demand: &Demand, capacity: &Capacity) -> u32 {
    let most = capacity.max_batch_tokens;
    let Some(measure) = capacity.step_tokens else {
        return most;
    };
    let measure = measure.min(most);
    let Demand { decodes, backlog } = *demand;
    if decodes == 0 {
        return most.min(IDLE_STEP * measure);
    }
    let prompts = (USUAL_PROMPTS * decodes).max(backlog / STEPS_FOR_ALL);
    let nearest = (decodes + prompts + measure / 2) / measure;
    // However many decodes there are, prompts make progress.
    let least = (decodes + measure.div_ceil(2)).div_ceil(measure);
    most.min(nearest.clamp(*STEP.start(), *STEP.end()).max(least) * measure)
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

    fn demand(decodes: u32, backlog: u32) -> Demand {
        Demand { decodes, backlog }
    }

    #[test]
    fn steps_grow_with_what_there_is_to_do() {
        let h100 = capacity(Some(256));
        let budgets = [0, 1, 128, 200, 256].map(|n| step_budget(&demand(n, 0), &h100));
        assert_eq!(budgets, [2048, 512, 512, 768, 1024]);
        let budgets = [5_000, 20_000, 100_000].map(|n| step_budget(&demand(64, n), &h100));
        assert_eq!(budgets, [512, 768, 1024]);
    }

    #[test]
    fn without_a_measure_only_the_limit_counts() {
        for measure in [None, Some(u32::MAX)] {
            let budgets = [0, 1, 500].map(|n| step_budget(&demand(n, 0), &capacity(measure)));
            assert_eq!(budgets, [8192; 3]);
        }
    }

    #[test]
    fn decodes_leave_room_for_prompts() {
        for measure in [1, 2, 3, 128, 256] {
            let capacity = capacity(Some(measure));
            for n in 0..2000 {
                assert!(step_budget(&demand(n, 0), &capacity) > n, "{measure} {n}");
            }
        }
    }
}
