use spate_executor::{Batch, BlockCopy, Input, Row};
use spate_types::BlockId;

use super::packer::Packer;
use super::slots::Slots;
use crate::CudaError;
use crate::driver::Slice;
use crate::kernels::{Attention, AttentionStep, LAST, NONE, Sequence, Want, Work};

/// A step, described on the host.
#[derive(Debug, Default)]
pub(crate) struct HostStep {
    /// Token ids, or [`LAST`] and a slot.
    tokens: Vec<u32>,
    positions: Vec<u32>,
    /// Where each token's key and value go.
    places: Vec<u32>,
    /// The same in the pool of layers with a window, if there is one.
    local_places: Vec<u32>,
    /// Index of each row's last token; the slot whose last token is its input, or [`NONE`].
    rows: Vec<u32>,
    /// Rows with given tokens: prompts, whole or in chunks.
    prompts: Vec<Sequence>,
    /// Rows that go on from the last sampled token.
    decodes: Vec<Sequence>,
    pub(crate) wants: Vec<Want>,
    /// Index of each wanted position's token.
    picks: Vec<u32>,
    /// What changed in block tables.
    words: Vec<u32>,
    /// Copied blocks: from, to.
    copies: Vec<u32>,
    local_copies: Vec<u32>,
}

/// A step on the GPU.
pub(crate) struct Step {
    pub(crate) tokens: Slice<u32>,
    pub(crate) positions: Slice<u32>,
    pub(crate) places: Slice<u32>,
    pub(crate) local_places: Slice<u32>,
    pub(crate) rows: Slice<u32>,
    pub(crate) wants: Slice<Want>,
    /// Index of each wanted position's token.
    pub(crate) picks: Slice<u32>,
    pub(crate) words: Slice<u32>,
    pub(crate) copies: Slice<u32>,
    pub(crate) local_copies: Slice<u32>,
    /// Attention of layers that see everything, and of those with a window.
    pub(crate) global: AttentionLists,
    pub(crate) local: Option<AttentionLists>,
}

/// The attention work of a step, for one window.
pub(crate) struct AttentionLists {
    pub(crate) prompts: Option<AttentionStep>,
    /// Several if one would need too much scratch memory.
    pub(crate) decodes: Vec<AttentionStep>,
}

/// What the description of a step depends on.
pub(crate) struct Describe<'a> {
    pub(crate) attention: &'a Attention,
    /// Work that fits into the decode scratch.
    pub(crate) max_works: usize,
    /// Block tables of all slots.
    pub(crate) tables: Slice<u32>,
    /// Window of the layers that have one, and how much further on in `tables` their pool's are.
    pub(crate) local: Option<(u32, u32)>,
}

impl HostStep {
    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.places.clear();
        self.local_places.clear();
        self.rows.clear();
        self.prompts.clear();
        self.decodes.clear();
        self.wants.clear();
        self.picks.clear();
        self.words.clear();
        self.copies.clear();
        self.local_copies.clear();
    }

    /// Describes a batch whose shape was checked and whose slots are bound.
    pub(crate) fn fill(&mut self, batch: &Batch, slots: &mut Slots, block_size: u32) {
        self.clear();
        let pairs = |copies: &[BlockCopy]| {
            let pairs = copies.iter().flat_map(|copy| [copy.src.0, copy.dst.0]);
            pairs.collect::<Vec<u32>>()
        };
        self.copies.extend(pairs(&batch.copies));
        self.local_copies.extend(pairs(&batch.local_copies));
        for row in &batch.rows {
            slots.update_tables(row, &mut self.words);
            self.push(row, slots, block_size);
        }
    }

    fn push(&mut self, row: &Row, slots: &Slots, block_size: u32) {
        let (first, count) = (self.tokens.len() as u32, row.input.len() as u32);
        let sequence = Sequence {
            token: first,
            tokens: count,
            position: row.start,
            table: slots.table(row.slot),
        };
        let from_last = match &row.input {
            Input::Tokens(tokens) => {
                self.tokens.extend(tokens);
                self.prompts.push(sequence);
                NONE
            }
            Input::Last => {
                self.tokens.push(LAST | row.slot.0);
                self.decodes.push(sequence);
                row.slot.0
            }
        };
        let index = (self.rows.len() / 2) as u32;
        self.rows.extend([first + count - 1, from_last]);
        let prompt = &slots.get(row.slot).prompt;
        for position in row.start..row.end() {
            let of = (position / block_size) as usize;
            let place = |BlockId(block)| block * block_size + position % block_size;
            self.positions.push(position);
            self.places.push(place(row.blocks[of]));
            self.local_places.extend(row.local.get(of).map(place));
            let next = position + 1;
            let target = prompt.get(next as usize).filter(|_| row.prompt_logprobs);
            let sample = row.sample && next == row.end();
            if target.is_some() || sample {
                self.picks.push(first + position - row.start);
                self.wants.push(Want {
                    slot: row.slot.0,
                    row: index,
                    position: next,
                    target: target.copied().unwrap_or(NONE),
                    sample: sample.into(),
                });
            }
        }
    }

    /// Packs everything for the GPU.
    pub(crate) fn pack(&self, packer: &mut Packer, d: &Describe<'_>) -> Result<Step, CudaError> {
        let global = lists(packer, d, &self.prompts, &self.decodes, None)?;
        let local = match d.local {
            Some((window, further)) => {
                let local = |of: &[Sequence]| -> Vec<Sequence> {
                    let moved = |s: &Sequence| Sequence {
                        table: s.table + further,
                        ..*s
                    };
                    of.iter().map(moved).collect()
                };
                let (prompts, decodes) = (local(&self.prompts), local(&self.decodes));
                Some(lists(packer, d, &prompts, &decodes, Some(window))?)
            }
            None => None,
        };
        Ok(Step {
            tokens: packer.put(&self.tokens)?,
            positions: packer.put(&self.positions)?,
            places: packer.put(&self.places)?,
            local_places: packer.put(&self.local_places)?,
            rows: packer.put(&self.rows)?,
            wants: packer.put(&self.wants)?,
            picks: packer.put(&self.picks)?,
            words: packer.put(&self.words)?,
            copies: packer.put(&self.copies)?,
            local_copies: packer.put(&self.local_copies)?,
            global,
            local,
        })
    }
}

/// The attention work of sequences in one pool.
fn lists(
    packer: &mut Packer,
    d: &Describe<'_>,
    prompts: &[Sequence],
    decodes: &[Sequence],
    window: Option<u32>,
) -> Result<AttentionLists, CudaError> {
    let mut pack = |work: &[Work]| {
        Ok::<_, CudaError>(AttentionStep {
            tables: d.tables,
            work: packer.put(work)?,
            works: packer.put(&[work.len() as u32])?,
            window,
        })
    };
    let mut work = Vec::new();
    let prompts = match prompts.is_empty() {
        true => None,
        false => {
            d.attention.prefill_work(prompts, window, &mut work);
            Some(pack(&work)?)
        }
    };
    let (mut steps, mut rest) = (Vec::new(), decodes);
    while !rest.is_empty() {
        // As many sequences as fit; one always does.
        let mut count = rest.len();
        loop {
            d.attention.decode_work(&rest[..count], window, &mut work);
            if work.len() <= d.max_works || count == 1 {
                break;
            }
            count = count.div_ceil(2);
        }
        steps.push(pack(&work)?);
        rest = &rest[count..];
    }
    Ok(AttentionLists {
        prompts,
        decodes: steps,
    })
}
