use std::sync::Arc;

use spate_executor::Bind;
use spate_types::{BlockId, BlockIds, Slot, TokenId};

use super::packer::Packer;
use crate::CudaError;
use crate::driver::{Arena, Plain, Slice, Stream};
use crate::kernels::{Edit, MAX_EDITS, Sample, SlotMemory, SlotParams};

/// What sequences keep between steps: on the GPU what kernels need, here what the host needs to
/// describe a step. Shared by all lanes: a sequence is in one lane at a time.
pub(crate) struct Slots {
    host: Vec<Option<HostSlot>>,
    pub(crate) memory: SlotMemory,
    /// `[slots, max_blocks]`: block ids of each sequence.
    pub(crate) tables: Slice<u32>,
    pub(crate) max_blocks: usize,
    vocab: usize,
}

/// The host's part of a slot.
pub(crate) struct HostSlot {
    pub(crate) prompt: Arc<[TokenId]>,
    /// What the table on the GPU holds.
    table: BlockIds,
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
}

impl SlotSizes {
    /// Bytes that [`Slots::new`] takes.
    pub(crate) fn bytes(&self) -> u64 {
        let Self { slots, vocab, .. } = *self;
        Arena::room_for::<SlotParams>(slots)
            + Arena::room_for::<u64>(slots * MAX_EDITS)
            + Arena::room_for::<u16>(slots * vocab)
            + 2 * Arena::room_for::<u32>(slots)
            + Arena::room_for::<u32>(slots * self.max_blocks)
    }
}

impl Slots {
    pub(crate) fn new(arena: &mut Arena, sizes: SlotSizes) -> Result<Self, CudaError> {
        let SlotSizes {
            slots,
            vocab,
            max_blocks,
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
            tables: arena.take(slots * max_blocks)?,
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

    /// Appends what changed in a sequence's table to `words`, as [`crate::kernels::Scatter`] takes it.
    pub(crate) fn update_table(&mut self, slot: Slot, blocks: &BlockIds, words: &mut Vec<u32>) {
        let at = slot.0 as usize;
        let host = self.host[at].as_mut().expect("the slot is bound");
        if Arc::ptr_eq(&host.table, blocks) {
            return;
        }
        let old: &[BlockId] = &host.table;
        for (i, block) in blocks.iter().enumerate().take(self.max_blocks) {
            if old.get(i) != Some(block) {
                words.extend([(at * self.max_blocks + i) as u32, block.0]);
            }
        }
        host.table = blocks.clone();
    }
}
