use std::collections::HashSet;

use spate_executor::{Batch, Bind, BlockCopy, Capacity, Input, Lane, Row};
use spate_types::{BlockId, SamplingParams, TokenId};

/// Checks batches against the contract before any of them runs, so that the step thread can rely
/// on every index in them.
#[derive(Debug)]
pub(crate) struct Gate {
    slots: Vec<SlotUse>,
}

/// What is known of a slot when everything submitted so far has run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotUse {
    Free,
    Bound,
    /// Bound, and a token was sampled for it.
    Sampled,
}

impl Gate {
    pub(crate) fn new(capacity: &Capacity) -> Self {
        Self {
            slots: vec![SlotUse::Free; capacity.slots as usize],
        }
    }

    pub(crate) fn release(&mut self, slot: usize) {
        if let Some(slot) = self.slots.get_mut(slot) {
            *slot = SlotUse::Free;
        }
    }

    /// Admits a batch or says which rule it breaks.
    pub(crate) fn admit(
        &mut self,
        capacity: &Capacity,
        lane: Lane,
        batch: &Batch,
    ) -> Result<(), String> {
        ensure(capacity.lanes.contains(&lane), || {
            format!("there is no lane {lane:?}")
        })?;
        ensure(!batch.rows.is_empty(), || "it has no rows".into())?;
        let mut written = HashSet::new();
        for &BlockCopy { src, dst } in &batch.copies {
            for block in [src, dst] {
                check_block(capacity, block)?;
            }
            ensure(src != dst, || format!("{src:?} is copied onto itself"))?;
            ensure(written.insert(dst), || format!("{dst:?} is written twice"))?;
        }
        // Rows may write what a copy wrote, but not what another row writes.
        written.clear();
        let mut tokens = 0u64;
        let mut slots = HashSet::new();
        for row in &batch.rows {
            let slot = row.slot;
            self.check_row(capacity, row)
                .map_err(|rule| format!("row of {slot:?}: {rule}"))?;
            tokens += row.input.len() as u64;
            ensure(slots.insert(slot), || format!("{slot:?} comes twice"))?;
            let blocks = row.start / capacity.block_size..=(row.end() - 1) / capacity.block_size;
            for i in blocks {
                let block = row.blocks[i as usize];
                ensure(written.insert(block), || {
                    format!("{block:?} is written twice")
                })?;
            }
        }
        ensure(tokens <= capacity.max_batch_tokens.into(), || {
            format!("{tokens} tokens, at most {}", capacity.max_batch_tokens)
        })?;
        for row in &batch.rows {
            let slot = &mut self.slots[row.slot.0 as usize];
            if row.bind.is_some() {
                *slot = SlotUse::Bound;
            }
            if row.sample {
                *slot = SlotUse::Sampled;
            }
        }
        Ok(())
    }

    fn check_row(&self, capacity: &Capacity, row: &Row) -> Result<(), String> {
        let slot = self.slots.get(row.slot.0 as usize);
        let mut state = *slot.ok_or_else(|| format!("there are {} slots", capacity.slots))?;
        if let Some(bind) = &row.bind {
            check_bind(capacity, bind)?;
            state = SlotUse::Bound;
        }
        ensure(state != SlotUse::Free, || "the slot is not bound".into())?;
        match &row.input {
            Input::Last => ensure(state == SlotUse::Sampled, || {
                "no token was sampled that could be the input".into()
            })?,
            Input::Tokens(tokens) => {
                ensure(!tokens.is_empty(), || "it has no tokens".into())?;
                check_tokens(capacity, tokens)?;
            }
        }
        let end = u64::from(row.start) + row.input.len() as u64;
        ensure(end <= capacity.max_seq_len.into(), || {
            format!("it ends at position {end}, behind {}", capacity.max_seq_len)
        })?;
        let covered = row.blocks.len() as u64 * u64::from(capacity.block_size);
        ensure(end <= covered, || {
            format!("its blocks cover {covered} positions of {end}")
        })?;
        row.blocks
            .iter()
            .try_for_each(|&block| check_block(capacity, block))
    }
}

fn ensure(holds: bool, rule: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(rule()) }
}

fn check_block(capacity: &Capacity, block: BlockId) -> Result<(), String> {
    ensure(block.0 < capacity.blocks, || {
        format!("{block:?} of {} blocks", capacity.blocks)
    })
}

fn check_tokens(capacity: &Capacity, tokens: &[TokenId]) -> Result<(), String> {
    match tokens.iter().find(|&&t| t >= capacity.vocab_size) {
        Some(token) => Err(format!("token {token} of {}", capacity.vocab_size)),
        None => Ok(()),
    }
}

fn check_bind(capacity: &Capacity, bind: &Bind) -> Result<(), String> {
    ensure(!bind.prompt.is_empty(), || "the prompt is empty".into())?;
    check_tokens(capacity, &bind.prompt)?;
    let SamplingParams {
        temperature,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        ref logit_bias,
        ref min_tokens_banned,
        ..
    } = *bind.sampling;
    check_tokens(capacity, min_tokens_banned)?;
    let biased: Vec<TokenId> = logit_bias.iter().map(|b| b.0).collect();
    check_tokens(capacity, &biased)?;
    let finite = |v: f32| v.is_finite();
    let in_range = temperature >= 0.0
        && finite(temperature)
        && top_p > 0.0
        && top_p <= 1.0
        && (0.0..=1.0).contains(&min_p)
        && repetition_penalty > 0.0
        && finite(repetition_penalty)
        && finite(presence_penalty)
        && finite(frequency_penalty)
        && logit_bias.iter().all(|b| finite(b.1));
    ensure(in_range, || {
        "a sampling parameter is out of its range".into()
    })
}
