use spate_executor::{Batch, Input, Row, RowOutput, Ticket, TokenMask};
use spate_model::Rotation;
use spate_types::{BlockIds, LocalBlocks, Slot, TokenId};

use crate::kv::Pages;
use crate::rope;
use crate::slots::SlotState;

/// Positions of one sequence whose queries one task answers.
const ATTENTION_TOKENS: usize = 16;

/// A batch as the operations see it. One value is refilled for every step.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// All input tokens, row after row.
    pub(crate) tokens: Vec<TokenId>,
    /// Their positions in their sequences.
    pub(crate) positions: Vec<u32>,
    /// The row that each belongs to.
    pub(crate) row_of: Vec<usize>,
    pub(crate) rows: Vec<StepRow>,
    /// Work for attention, to be done once per key/value head.
    pub(crate) spans: Vec<Span>,
    /// Positions that want logits.
    pub(crate) wanted: Vec<Wanted>,
    /// For each rotary embedding of the model, what turns each token, `[tokens][dims / 2]`.
    pub(crate) rotations: Vec<Vec<(f32, f32)>>,
    pub(crate) ticket: Ticket,
    /// How many masks it waits for.
    pub(crate) masked: usize,
    /// Once they came, of the masked rows in their order.
    pub(crate) masks: Vec<TokenMask>,
    /// One per row.
    pub(crate) outputs: Vec<RowOutput>,
}

#[derive(Debug)]
pub(crate) struct StepRow {
    pub(crate) slot: Slot,
    blocks: BlockIds,
    local: LocalBlocks,
    /// Index of its last token.
    pub(crate) last: usize,
}

impl StepRow {
    /// Its blocks in the local pool, or in the main one.
    pub(crate) fn pages(&self, local: bool) -> Pages<'_> {
        let (first, blocks) = if local {
            (self.local.first as usize, &self.local.blocks)
        } else {
            (0, &self.blocks)
        };
        Pages { first, blocks }
    }
}

/// Consecutive tokens of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) row: usize,
    /// Index of the first token.
    pub(crate) token: usize,
    pub(crate) count: usize,
}

/// A position that wants logits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) row: usize,
    /// Index of the token.
    pub(crate) token: usize,
    /// The prompt token that comes next, if its logprobs were asked for.
    pub(crate) target: Option<TokenId>,
    /// Whether to choose the token that comes next.
    pub(crate) sample: bool,
    /// Which of the step's masks says what may be chosen.
    pub(crate) mask: Option<usize>,
}

impl Step {
    /// Fills in a batch whose rows are bound and whose shape was checked.
    pub(crate) fn fill(
        &mut self,
        ticket: Ticket,
        batch: &Batch,
        slots: &[Option<SlotState>],
        ropes: &[Rotation],
    ) {
        self.tokens.clear();
        self.positions.clear();
        self.row_of.clear();
        self.rows.clear();
        self.spans.clear();
        self.wanted.clear();
        self.ticket = ticket;
        self.masked = 0;
        self.masks.clear();
        self.outputs.clear();
        for row in &batch.rows {
            self.push(row, slots[row.slot.0 as usize].as_ref());
        }
        self.rotations.resize_with(ropes.len(), Vec::new);
        for (rope, rotations) in ropes.iter().zip(&mut self.rotations) {
            rotations.clear();
            rope::turn(rope, &self.positions, rotations);
        }
    }

    fn push(&mut self, row: &Row, slot: Option<&SlotState>) {
        let slot = slot.expect("submit refuses rows of slots that are not bound");
        let (index, first, count) = (self.rows.len(), self.tokens.len(), row.input.len());
        let mut output = RowOutput::default();
        match &row.input {
            Input::Tokens(tokens) => self.tokens.extend(tokens),
            Input::Last => {
                // Absent only if the sample that this row was to go on from failed.
                output.failed = slot.last.is_none();
                self.tokens.push(slot.last.unwrap_or(0));
            }
        }
        self.outputs.push(output);
        self.positions.extend(row.start..row.end());
        self.row_of.extend(std::iter::repeat_n(index, count));
        self.rows.push(StepRow {
            slot: row.slot,
            blocks: row.blocks.clone(),
            local: row.local.clone(),
            last: first + count - 1,
        });
        self.spans
            .extend((0..count).step_by(ATTENTION_TOKENS).map(|start| Span {
                row: index,
                token: first + start,
                count: ATTENTION_TOKENS.min(count - start),
            }));
        for i in 0..count {
            let next = row.start as usize + i + 1;
            let target = slot.prompt.get(next).copied();
            let target = target.filter(|_| row.prompt_logprobs);
            let sample = row.sample && i == count - 1;
            let mask = (sample && row.masked).then_some(self.masked);
            self.masked += usize::from(mask.is_some());
            if target.is_some() || sample {
                self.wanted.push(Wanted {
                    row: index,
                    token: first + i,
                    target,
                    sample,
                    mask,
                });
            }
        }
    }
}
