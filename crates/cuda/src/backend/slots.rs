use std::sync::Arc;

use spate_executor::{Bind, Row};
use spate_types::{BlockId, BlockIds, LocalBlocks, Slot, TokenId};

use super::packer::Packer;
use crate::CudaError;
use crate::driver::{Arena, Plain, Slice, Stream};
use crate::kernels::{Edit, MAX_EDITS, Sample, SlotMemory, SlotParams, counts_stride};

/// What sequences keep between steps: on the GPU what kernels need, here what the host needs to
/// describe a step. Shared by all lanes: a sequence is in one lane at a time.
pub(crate) struct Slots {
    host: Vec<Option<HostSlot>>,
    pub(crate) memory: SlotMemory,
    /// `[pools, slots, max_blocks]`: block ids of each sequence, in the main pool and in that of layers
    /// with a window.
    pub(crate) tables: Slice<u32>,
    pub(crate) max_blocks: usize,
    vocab: usize,
}

/// The host's part of a slot.
pub(crate) struct HostSlot {
    pub(crate) prompt: Arc<[TokenId]>,
    /// What the tables on the GPU hold.
    table: BlockIds,
    local: LocalBlocks,
}

/// The start of a sequence, as far as it is packed.
pub(crate) struct QueuedBind {
    slot: Slot,
    /// Slot, first token in `prompt`, number of tokens.
    triple: Slice<u32>,
    params: Slice<SlotParams>,
    edits: Cargo<Edit>,
    /// As far as penalties count it.
    prompt: Cargo<u32>,
}

/// Data for the GPU of a size that nothing bounds but a request's own limits.
enum Cargo<T> {
    Packed(Slice<T>),
    /// There was no room: it is copied by the driver, which may wait for the stream.
    Left(Vec<T>),
}

impl<T: Plain> Cargo<T> {
    fn pack(packer: &mut Packer, data: &[T]) -> Result<Self, CudaError> {
        Ok(match packer.has_room_for(data) {
            true => Self::Packed(packer.put(data)?),
            false => Self::Left(data.to_vec()),
        })
    }

    fn len(&self) -> usize {
        match self {
            Self::Packed(slice) => slice.len(),
            Self::Left(data) => data.len(),
        }
    }

    /// # Safety
    /// The target stays allocated until the copy has run.
    unsafe fn copy(&self, stream: &Stream, to: Slice<T>) -> Result<(), CudaError> {
        // SAFETY: what is packed stays until the step has completed; what is not is pageable, so the
        // driver has taken it when it returns. The caller vouches for the target.
        unsafe {
            match self {
                Self::Packed(slice) => stream.copy(*slice, to),
                Self::Left(data) => stream.upload(data, to),
            }
        }
    }
}

/// Sizes of [`Slots`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotSizes {
    pub(crate) slots: usize,
    pub(crate) vocab: usize,
    pub(crate) max_blocks: usize,
    /// Pools in which a sequence may have blocks.
    pub(crate) tables: usize,
}

impl SlotSizes {
    /// Bytes that [`Slots::new`] takes.
    pub(crate) fn bytes(&self) -> u64 {
        let Self { slots, vocab, .. } = *self;
        Arena::room_for::<SlotParams>(slots)
            + Arena::room_for::<u64>(slots * MAX_EDITS)
            + Arena::room_for::<u16>(slots * counts_stride(vocab))
            + 2 * Arena::room_for::<u32>(slots)
            + Arena::room_for::<u32>(self.tables * slots * self.max_blocks)
    }
}

impl Slots {
    pub(crate) fn new(arena: &mut Arena, sizes: SlotSizes) -> Result<Self, CudaError> {
        let SlotSizes {
            slots,
            vocab,
            max_blocks,
            tables,
        } = sizes;
        Ok(Self {
            host: (0..slots).map(|_| None).collect(),
            memory: SlotMemory {
                params: arena.take(slots)?,
                edits: arena.take(slots * MAX_EDITS)?,
                counts: arena.take(slots * counts_stride(vocab))?,
                generated: arena.take(slots)?,
                last: arena.take(slots)?,
            },
            tables: arena.take(tables * slots * max_blocks)?,
            max_blocks,
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
            table: BlockIds::default(),
            local: LocalBlocks::default(),
        });
    }

    /// Packs the starts of sequences: last of a step, because what they bring may be large.
    pub(crate) fn pack_binds<'a>(
        packer: &mut Packer,
        binds: impl Iterator<Item = (Slot, &'a Bind)>,
    ) -> Result<Vec<QueuedBind>, CudaError> {
        let mut queued = Vec::new();
        let mut cargo = Vec::new();
        for (slot, bind) in binds {
            let (params, edits) = SlotParams::new(&bind.sampling, bind.seed)?;
            let counted = match bind.sampling.has_penalties() {
                true => &bind.prompt[..],
                false => &[],
            };
            queued.push(QueuedBind {
                slot,
                triple: packer.put(&[slot.0, 0, bind.prompt.len() as u32])?,
                params: packer.put(&[params])?,
                edits: Cargo::Left(Vec::new()),
                prompt: Cargo::Left(Vec::new()),
            });
            cargo.push((edits, counted));
        }
        for (bind, (edits, counted)) in queued.iter_mut().zip(cargo) {
            bind.edits = Cargo::pack(packer, &edits)?;
            bind.prompt = Cargo::pack(packer, counted)?;
        }
        Ok(queued)
    }

    /// Queues the start of a sequence on the GPU. `room`: for a prompt of any length; of the stream's own.
    ///
    /// # Safety
    /// Nothing in flight names the slot; the packer's copy is queued before.
    pub(crate) unsafe fn bind(
        &self,
        stream: &Stream,
        kernel: &Sample,
        bind: &QueuedBind,
        room: Slice<u32>,
    ) -> Result<(), CudaError> {
        let (at, memory) = (bind.slot.0 as usize, &self.memory);
        let edits = at * MAX_EDITS..at * MAX_EDITS + bind.edits.len();
        // SAFETY: the arena outlives the slots, and what the bind kernel is given is in range.
        unsafe {
            stream.copy(bind.params, memory.params.range(at..at + 1))?;
            bind.edits.copy(stream, memory.edits.range(edits))?;
            let prompt = match &bind.prompt {
                Cargo::Packed(prompt) => *prompt,
                Cargo::Left(prompt) => {
                    stream.upload(prompt, room.range(0..prompt.len()))?;
                    room
                }
            };
            kernel.bind(stream, bind.triple, prompt, self.vocab, memory)
        }
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
}
