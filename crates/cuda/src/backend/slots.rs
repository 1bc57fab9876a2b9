use std::sync::Arc;

use spate_executor::{Bind, Row};
use spate_types::{BlockId, BlockIds, LocalBlocks, SamplingParams, Slot, TokenId};

use super::packer::Packer;
use crate::CudaError;
use crate::driver::{Arena, Slice, Stream};
use crate::kernels::{MAX_EDITS, Sample, SlotMemory, SlotParams};

/// What sequences keep between steps: on the GPU what kernels need, here what the host needs to
/// describe a step. Shared by all lanes: a sequence is in one lane at a time.
pub(crate) struct Slots {
    host: Vec<Option<HostSlot>>,
    pub(crate) memory: SlotMemory,
    /// `[pools, slots, max_blocks]`: block ids of each sequence, in the main pool and in that of layers
    /// with a window.
    pub(crate) tables: Slice<u32>,
    pub(crate) max_blocks: usize,
    /// A prompt on its way to the penalty counts.
    prompt: Slice<u32>,
    vocab: usize,
}

/// The host's part of a slot.
pub(crate) struct HostSlot {
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) sampling: Arc<SamplingParams>,
    /// What the tables on the GPU hold.
    table: BlockIds,
    local: LocalBlocks,
}

/// Sizes of [`Slots`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotSizes {
    pub(crate) slots: usize,
    pub(crate) vocab: usize,
    pub(crate) max_blocks: usize,
    /// Pools in which a sequence may have blocks.
    pub(crate) tables: usize,
    pub(crate) max_seq_len: usize,
}

impl SlotSizes {
    /// Bytes that [`Slots::new`] takes.
    pub(crate) fn bytes(&self) -> u64 {
        let Self { slots, vocab, .. } = *self;
        Arena::room_for::<SlotParams>(slots)
            + Arena::room_for::<u64>(slots * MAX_EDITS)
            + Arena::room_for::<u16>(slots * vocab)
            + 2 * Arena::room_for::<u32>(slots)
            + Arena::room_for::<u32>(self.tables * slots * self.max_blocks)
            + Arena::room_for::<u32>(self.max_seq_len)
    }
}

impl Slots {
    pub(crate) fn new(arena: &mut Arena, sizes: SlotSizes) -> Result<Self, CudaError> {
        let SlotSizes {
            slots,
            vocab,
            max_blocks,
            tables,
            max_seq_len,
        } = sizes;
        Ok(Self {
            host: (0..slots).map(|_| None).collect(),
            memory: SlotMemory {
                params: arena.take(slots)?,
                edits: arena.take(slots * MAX_EDITS)?,
                counts: arena.take(slots * vocab)?,
                generated: arena.take(slots)?,
                last: arena.take(slots)?,
            },
            tables: arena.take(tables * slots * max_blocks)?,
            max_blocks,
            prompt: arena.take(max_seq_len)?,
            vocab,
        })
    }

    pub(crate) fn get(&self, slot: Slot) -> &HostSlot {
        let host = self.host[slot.0 as usize].as_ref();
        host.expect("submit refuses rows of slots that are not bound")
    }

    pub(crate) fn release(&mut self, slot: Slot) {
        if let Some(slot) = self.host.get_mut(slot.0 as usize) {
            *slot = None;
        }
    }

    /// The device's form of a sequence's parameters, before anything is changed.
    pub(crate) fn check(bind: &Bind) -> Result<(), CudaError> {
        SlotParams::new(&bind.sampling, bind.seed).map(|_| ())
    }

    /// Notes a sequence that starts.
    pub(crate) fn note(&mut self, slot: Slot, bind: &Bind) {
        self.host[slot.0 as usize] = Some(HostSlot {
            prompt: bind.prompt.clone(),
            sampling: bind.sampling.clone(),
            table: BlockIds::default(),
            local: LocalBlocks::default(),
        });
    }

    /// Queues the start of a sequence on the GPU. `triple`: where the packer has `[slot, 0, prompt length]`.
    ///
    /// # Safety
    /// Nothing in flight names the slot.
    pub(crate) unsafe fn bind(
        &self,
        stream: &Stream,
        kernel: &Sample,
        slot: Slot,
        bind: &Bind,
        triple: Slice<u32>,
    ) -> Result<(), CudaError> {
        let at = slot.0 as usize;
        let (params, edits) = SlotParams::new(&bind.sampling, bind.seed)?;
        let memory = &self.memory;
        let on_edits = memory
            .edits
            .range(at * MAX_EDITS..at * MAX_EDITS + edits.len());
        // SAFETY: these are pageable, so the driver has taken them when it returns; the arena
        // outlives the slots, and what the bind kernel is given is in range.
        unsafe {
            stream.upload(&[params], memory.params.range(at..at + 1))?;
            stream.upload(&edits, on_edits)?;
            if bind.sampling.has_penalties() {
                stream.upload(&bind.prompt, self.prompt.range(0..bind.prompt.len()))?;
            }
            kernel.bind(stream, triple, self.prompt, self.vocab, memory)?;
        }
        Ok(())
    }

    /// Where a slot's blocks begin in [`tables`](Self::tables); [`local_tables`](Self::local_tables) further
    /// on those of the other pool.
    pub(crate) fn table(&self, slot: Slot) -> u32 {
        slot.0 * self.max_blocks as u32
    }

    /// From a slot's blocks in the main pool to those in the pool of layers with a window.
    pub(crate) fn local_tables(&self) -> u32 {
        (self.host.len() * self.max_blocks) as u32
    }

    /// Appends what changed in a row's tables to `words`, as [`crate::kernels::Scatter`] takes it.
    pub(crate) fn update_tables(&mut self, row: &Row, words: &mut Vec<u32>) {
        let at = self.table(row.slot);
        let local_at = at + self.local_tables();
        let most = self.max_blocks;
        let host = self.host[row.slot.0 as usize].as_mut();
        let host = host.expect("the slot is bound");
        if !Arc::ptr_eq(&host.table, &row.blocks) {
            for (i, block) in row.blocks.iter().enumerate().take(most) {
                if host.table.get(i) != Some(block) {
                    words.extend([at + i as u32, block.0]);
                }
            }
            host.table = row.blocks.clone();
        }
        let same = Arc::ptr_eq(&host.local.blocks, &row.local.blocks);
        if !same || host.local.first != row.local.first {
            for i in row.local.first as usize..row.local.end().min(most) {
                let block = row.local.get(i);
                if let Some(BlockId(id)) = block.filter(|_| host.local.get(i) != block) {
                    words.extend([local_at + i as u32, id]);
                }
            }
            host.local = row.local.clone();
        }
    }

    /// Packs what [`bind`](Self::bind) needs.
    pub(crate) fn pack_bind(
        packer: &mut Packer,
        slot: Slot,
        bind: &Bind,
    ) -> Result<Slice<u32>, CudaError> {
        packer.put(&[slot.0, 0, bind.prompt.len() as u32])
    }
}
