use spate_executor::{Batch, BlockCopy, Input, Row, Ticket};
use spate_types::{BlockId, BlockIds, LocalBlocks};

use super::packer::Packer;
use super::slots::Slots;
use crate::CudaError;
use crate::driver::Slice;
use crate::kernels::{
    ALL_BLOCKS, AttentionStep, DecodeWork, LAST, NONE, NOWHERE, Sequence, Sharer, Tiling, Want,
    Work,
};

/// A step, described on the host.
#[derive(Debug, Default)]
pub(crate) struct HostStep {
    /// What its completion is known by: not 0.
    pub(crate) ticket: u64,
    /// How many masks it waits for.
    masks: u32,
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
    prompts: Vec<Prompt>,
    /// Rows that go on from the last sampled token.
    decodes: Vec<Decode>,
    pub(crate) wants: Vec<Want>,
    /// Index of each wanted position's token.
    picks: Vec<u32>,
    /// What changed in block tables.
    words: Vec<u32>,
    /// Copied blocks: from, to.
    copies: Vec<u32>,
    local_copies: Vec<u32>,
    global: HostLists,
    local: Option<HostLists>,
}

#[derive(Debug)]
struct Prompt {
    sequence: Sequence,
    blocks: BlockIds,
    local: LocalBlocks,
}

#[derive(Debug)]
struct Decode {
    sequence: Sequence,
    blocks: BlockIds,
}

/// The attention work of a step, for one window.
#[derive(Debug, Default)]
struct HostLists {
    window: Option<u32>,
    /// Several if they would need too much room to be unpacked.
    prompts: Vec<PromptList>,
    /// Several if one would need too much scratch memory.
    decodes: Vec<WorkList>,
}

#[derive(Debug, Default)]
struct PromptList {
    work: WorkList,
    /// What is unpacked before, and where each sequence's blocks are then; of a cache of codes.
    unpacked: Option<(Vec<u32>, Vec<u32>)>,
}

#[derive(Debug, Default)]
struct WorkList {
    work: Vec<Work>,
    /// Of decodes.
    sharers: Vec<Sharer>,
    /// What work follows is padding.
    count: u32,
    /// How many thread blocks may do it.
    blocks: u32,
}

impl WorkList {
    fn new(work: Vec<Work>, sharers: Vec<Sharer>) -> Self {
        Self {
            count: work.len() as u32,
            blocks: ALL_BLOCKS,
            work,
            sharers,
        }
    }

    fn pad(&mut self, room: usize) {
        self.work.resize(room, Work::default());
    }
}

/// A step on the GPU.
pub(crate) struct Step {
    /// Everything of it.
    pub(crate) packed: Slice<u8>,
    /// Of that what is read up to the last hidden states, and what is read from there on.
    pub(crate) inputs: Slice<u8>,
    pub(crate) outputs: Slice<u8>,
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
    pub(crate) prompts: Vec<PromptStep>,
    /// Several if one would need too much scratch memory.
    pub(crate) decodes: Vec<AttentionStep>,
}

/// Attention of prompts.
pub(crate) struct PromptStep {
    /// What is unpacked before, of a cache of codes.
    pub(crate) blocks: Slice<u32>,
    pub(crate) step: AttentionStep,
}

/// What comes out of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outputs {
    pub(crate) rows: usize,
    /// Positions that want logits.
    pub(crate) wants: usize,
}

impl Outputs {
    /// Of rows each of which samples.
    pub(crate) fn of_rows(rows: usize) -> Self {
        Self { rows, wants: rows }
    }
}

/// What the description of a step depends on.
pub(crate) struct Describe {
    pub(crate) tiling: Tiling,
    /// Work that fits into the decode scratch.
    pub(crate) max_works: usize,
    pub(crate) block_size: u32,
    /// Blocks that can be unpacked at a time, if the cache has codes.
    pub(crate) unpacked: Option<u32>,
    /// Of the layers that have a window, if there are any.
    pub(crate) local: Option<LocalTables>,
}

/// Where layers with a window have their keys and values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalTables {
    pub(crate) window: u32,
    /// How much further on their pool's block tables are; 0 if they share the main pool.
    pub(crate) further: u32,
}

impl HostStep {
    pub(crate) fn clear(&mut self) {
        self.ticket = 0;
        self.masks = 0;
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
        self.global = HostLists::default();
        self.local = None;
    }

    /// Describes a batch whose shape was checked and whose slots are bound.
    pub(crate) fn fill(&mut self, ticket: Ticket, batch: &Batch, slots: &mut Slots, d: &Describe) {
        self.clear();
        self.ticket = ticket.0 + 1;
        let pairs = |copies: &[BlockCopy]| {
            let pairs = copies.iter().flat_map(|copy| [copy.src.0, copy.dst.0]);
            pairs.collect::<Vec<u32>>()
        };
        self.copies.extend(pairs(&batch.copies));
        self.local_copies.extend(pairs(&batch.local_copies));
        for row in &batch.rows {
            slots.update_tables(row, &mut self.words);
            self.push(row, slots, d.block_size);
        }
        self.global = self.lists(d, None);
        self.local = d.local.map(|local| self.lists(d, Some(local)));
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
                self.prompts.push(Prompt {
                    sequence,
                    blocks: row.blocks.clone(),
                    local: row.local.clone(),
                });
                NONE
            }
            Input::Last => {
                self.tokens.push(LAST | row.slot.0);
                self.decodes.push(Decode {
                    sequence,
                    blocks: row.blocks.clone(),
                });
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
                let masked = sample && row.masked;
                self.wants.push(Want {
                    mask: if masked { self.masks } else { NONE },
                    slot: row.slot.0,
                    row: index,
                    position: next,
                    target: target.copied().unwrap_or(NONE),
                    sample: sample.into(),
                });
                self.masks += u32::from(masked);
            }
        }
    }

    fn lists(&self, d: &Describe, local: Option<LocalTables>) -> HostLists {
        let (window, further) = match local {
            Some(local) => (Some(local.window), local.further),
            None => (None, 0),
        };
        let in_pool = |s: &Sequence| Sequence {
            table: s.table + further,
            ..*s
        };
        let mut lists = HostLists {
            window,
            ..HostLists::default()
        };
        match d.unpacked {
            _ if self.prompts.is_empty() => {}
            Some(room) => lists.prompts = self.unpacked_prompts(d, local, room),
            None => {
                let prompts = self.prompts.iter().map(|prompt| in_pool(&prompt.sequence));
                let (prompts, mut work) = (prompts.collect::<Vec<_>>(), Vec::new());
                d.tiling.prefill_work(&prompts, window, &mut work);
                lists.prompts.push(PromptList {
                    work: WorkList::new(work, Vec::new()),
                    unpacked: None,
                });
            }
        }
        let decodes = self.decodes.iter();
        let decodes: Vec<_> = decodes
            .map(|decode| (in_pool(&decode.sequence), &decode.blocks[..]))
            .collect();
        let mut rest = &decodes[..];
        while !rest.is_empty() {
            // As many sequences as fit; one always does.
            let (mut list, mut count) = (DecodeWork::default(), rest.len());
            loop {
                d.tiling.decode_work(&rest[..count], window, &mut list);
                if list.sharers.len() <= d.max_works || count == 1 {
                    break;
                }
                count = count.div_ceil(2);
            }
            lists.decodes.push(WorkList::new(list.work, list.sharers));
            rest = &rest[count..];
        }
        // The last prompts and the first decodes run side by side.
        if let (Some(prompts), Some(decodes)) = (lists.prompts.last_mut(), lists.decodes.first()) {
            prompts.work.blocks =
                d.tiling
                    .prefill_blocks(&prompts.work.work, &decodes.work, window);
        }
        lists
    }

    /// Prompts that read unpacked blocks: as many at a time as there is room for.
    fn unpacked_prompts(
        &self,
        d: &Describe,
        local: Option<LocalTables>,
        room: u32,
    ) -> Vec<PromptList> {
        let window = local.map(|local| local.window);
        let own_pool = local.is_some_and(|local| local.further > 0);
        let (mut lists, mut rest) = (Vec::new(), &self.prompts[..]);
        while !rest.is_empty() {
            let (mut sequences, mut blocks, mut tables) = (Vec::new(), Vec::new(), Vec::new());
            for Prompt {
                sequence,
                blocks: main,
                local,
            } in rest
            {
                let end = (sequence.position + sequence.tokens).div_ceil(d.block_size);
                let hidden = window.map_or(0, |w| (sequence.position + 1).saturating_sub(w));
                let seen = hidden / d.block_size..end;
                if blocks.len() + seen.len() > room as usize {
                    break;
                }
                sequences.push(Sequence {
                    table: tables.len() as u32,
                    ..*sequence
                });
                // What is hidden is not read.
                tables.resize(tables.len() + seen.start as usize, 0);
                for i in seen.start as usize..seen.end as usize {
                    tables.push(blocks.len() as u32);
                    let BlockId(block) = match own_pool {
                        true => local
                            .get(i)
                            .expect("the contract checked that it is covered"),
                        false => main[i],
                    };
                    blocks.push(block);
                }
            }
            assert!(
                !sequences.is_empty(),
                "there is room for the longest sequence"
            );
            let mut work = Vec::new();
            d.tiling.prefill_work(&sequences, window, &mut work);
            lists.push(PromptList {
                work: WorkList::new(work, Vec::new()),
                unpacked: Some((blocks, tables)),
            });
            rest = &rest[sequences.len()..];
        }
        lists
    }

    /// How many rows there are, and positions that want logits.
    pub(crate) fn outputs(&self) -> Outputs {
        Outputs {
            rows: self.rows.len() / 2,
            wants: self.wants.len(),
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whether [`pad_decode`](Self::pad_decode) can make it as large as any step of so many rows, all of
    /// which decode and sample.
    pub(crate) fn fits_decode(&self, rows: usize) -> bool {
        let mut lists = std::iter::once(&self.global).chain(&self.local);
        self.copies.is_empty()
            && self.local_copies.is_empty()
            && self.tokens.len() <= rows
            && self.wants.len() == self.tokens.len()
            && self.words.len() <= words_room(rows)
            && lists.all(|lists| lists.prompts.is_empty() && lists.decodes.len() <= 1)
    }

    /// Whether [`pad_mixed`](Self::pad_mixed) can make it as large as any step of so many tokens, with so
    /// many rows at most.
    pub(crate) fn fits_mixed(&self, tokens: usize, most_rows: usize, d: &Describe) -> bool {
        let room = d.prompt_room(tokens, most_rows);
        let one_of_each = |lists: &HostLists| {
            let fits = |list: &PromptList| list.unpacked.is_none() && list.work.work.len() <= room;
            lists.prompts.len() <= 1 && lists.prompts.iter().all(fits) && lists.decodes.len() <= 1
        };
        let Outputs { rows, wants } = self.outputs();
        self.tokens.len() <= tokens
            && rows.max(wants) <= most_rows
            && std::iter::once(&self.global)
                .chain(&self.local)
                .all(one_of_each)
    }

    /// Adds rows that do nothing, so that every step of that many rows is packed alike.
    pub(crate) fn pad_decode(&mut self, rows: usize, d: &Describe) {
        self.pad_tokens(rows, d);
        self.pad_outputs(rows);
        self.words.resize(words_room(rows), NOWHERE);
    }

    /// Adds tokens and rows that do nothing, so that what is read on the way to the hidden states is packed
    /// alike in every step of that many tokens, and what is read from there on in every step.
    pub(crate) fn pad_mixed(&mut self, tokens: usize, most_rows: usize, d: &Describe) {
        self.pad_tokens(tokens, d);
        self.pad_outputs(most_rows);
        for lists in std::iter::once(&mut self.global).chain(&mut self.local) {
            lists.prompts.resize_with(1, PromptList::default);
            lists.prompts[0].work.pad(d.prompt_room(tokens, most_rows));
        }
    }

    /// Adds tokens that have no place in the cache and no attention work.
    fn pad_tokens(&mut self, tokens: usize, d: &Describe) {
        self.tokens.resize(tokens, 0);
        self.positions.resize(tokens, 0);
        self.places.resize(tokens, NOWHERE);
        if d.local.is_some_and(|local| local.further > 0) {
            self.local_places.resize(tokens, NOWHERE);
        }
        if self.local.is_none() {
            self.local = d.local.map(|local| self.lists(d, Some(local)));
        }
        for lists in std::iter::once(&mut self.global).chain(&mut self.local) {
            lists.decodes.resize_with(1, WorkList::default);
            let list = &mut lists.decodes[0];
            list.pad(d.max_works);
            list.sharers.resize(d.max_works, Sharer::default());
        }
    }

    /// Adds rows that have no slot. They look at the first token.
    fn pad_outputs(&mut self, rows: usize) {
        while self.rows.len() < 2 * rows {
            self.rows.extend([0, NONE]);
        }
        self.picks.resize(rows, 0);
        self.wants.resize(
            rows,
            Want {
                slot: NONE,
                row: 0,
                position: 0,
                target: NONE,
                sample: 0,
                mask: NONE,
            },
        );
    }

    /// Packs everything for the GPU. `tables`: block tables of all slots.
    pub(crate) fn pack(&self, packer: &mut Packer, tables: Slice<u32>) -> Result<Step, CudaError> {
        // The kernels of step_io.cu look for these at the start.
        packer.put(&[self.ticket, u64::from(self.masks)])?;
        let rows = packer.put(&self.rows)?;
        let wants = packer.put(&self.wants)?;
        let picks = packer.put(&self.picks)?;
        let outputs = packer.packed();
        Ok(Step {
            outputs,
            rows,
            wants,
            picks,
            tokens: packer.put(&self.tokens)?,
            positions: packer.put(&self.positions)?,
            places: packer.put(&self.places)?,
            local_places: packer.put(&self.local_places)?,
            global: self.global.pack(packer, tables)?,
            local: match &self.local {
                Some(local) => Some(local.pack(packer, tables)?),
                None => None,
            },
            inputs: {
                let so_far = packer.packed();
                so_far.range(outputs.len()..so_far.len())
            },
            words: packer.put(&self.words)?,
            copies: packer.put(&self.copies)?,
            local_copies: packer.put(&self.local_copies)?,
            packed: packer.packed(),
        })
    }
}

impl Step {
    /// Leaves out the padding behind so many outputs.
    pub(crate) fn limit(&mut self, Outputs { rows, wants }: Outputs) {
        self.rows = self.rows.range(0..2 * rows);
        self.wants = self.wants.range(0..wants);
        self.picks = self.picks.range(0..wants);
    }
}

impl Describe {
    /// Units of attention work that prompts of so many tokens together can be.
    fn prompt_room(&self, tokens: usize, sequences: usize) -> usize {
        // Every sequence may end in the middle of a tile.
        self.tiling.prefill_tiles(tokens as u32) as usize + sequences
    }
}

impl HostLists {
    fn pack(&self, packer: &mut Packer, tables: Slice<u32>) -> Result<AttentionLists, CudaError> {
        let pack = |packer: &mut Packer, tables, list: &WorkList, beside| {
            Ok::<_, CudaError>(AttentionStep {
                tables,
                work: packer.put(&list.work)?,
                works: packer.put(&[list.count, list.blocks])?,
                sharers: packer.put(&list.sharers)?,
                window: self.window,
                beside,
            })
        };
        let mut lists = AttentionLists {
            prompts: Vec::new(),
            decodes: Vec::new(),
        };
        for PromptList { work, unpacked } in &self.prompts {
            let (blocks, tables) = match unpacked {
                Some((blocks, tables)) => (packer.put(blocks)?, packer.put(tables)?),
                None => (Slice::null(), tables),
            };
            let step = pack(packer, tables, work, false)?;
            lists.prompts.push(PromptStep { blocks, step });
        }
        for work in &self.decodes {
            // The next lists' decodes use the same scratch memory.
            let beside = !self.prompts.is_empty() && lists.decodes.is_empty();
            lists.decodes.push(pack(packer, tables, work, beside)?);
        }
        Ok(lists)
    }
}

/// Words for changes of block tables in a padded step: most rows change nothing, some get a block.
/// A step that changes more is not padded.
fn words_room(rows: usize) -> usize {
    2 * (2 * rows + 32)
}
