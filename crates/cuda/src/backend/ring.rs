use super::packer::Packer;
use crate::CudaError;
use crate::driver::{Device, Pinned, Slice, Stream};
use crate::kernels::{Chosen, Delivery, Done, FAILED_AT, MAX_TOP, RING, StepIo, Top, Turn};

/// The way of a lane's steps to the GPU and of their results back, by turns through two buffers of
/// page-locked memory each way. Which one's turn it is, the GPU counts for itself.
pub(crate) struct Ring {
    packers: [Packer; RING],
    results: [Pinned<u8>; RING],
    turn: Slice<Turn>,
    chosen_at: usize,
    tops_at: usize,
    next: usize,
}

/// What a step leaves on the GPU.
#[derive(Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) failed: Slice<u32>,
    pub(crate) chosen: Slice<Chosen>,
    pub(crate) tops: Slice<Top>,
}

impl Ring {
    /// `packed`: device memory for a step's description; `turn`: zeros; `most`: the largest outcome.
    pub(crate) fn new(
        device: &Device,
        packed: Slice<u8>,
        turn: Slice<Turn>,
        most: &Outcome,
    ) -> Result<Self, CudaError> {
        let chosen_at = (FAILED_AT + most.failed.bytes()).next_multiple_of(16);
        let tops_at = chosen_at + most.chosen.bytes();
        let bytes = tops_at + most.tops.bytes();
        Ok(Self {
            packers: [Packer::new(device, packed)?, Packer::new(device, packed)?],
            results: [Pinned::new(device, bytes)?, Pinned::new(device, bytes)?],
            turn,
            chosen_at,
            tops_at,
            next: 0,
        })
    }

    /// What the next step's description is packed with. The step that used it last has completed.
    pub(crate) fn packer(&mut self) -> &mut Packer {
        &mut self.packers[self.next]
    }

    /// The next step was queued: gives its buffer.
    pub(crate) fn advance(&mut self) -> usize {
        let queued = self.next;
        self.next = (queued + 1) % RING;
        queued
    }

    /// Queues the copy of a description.
    ///
    /// # Safety
    /// `packed` is what the packer gave; it is not cleared before the step has completed.
    pub(crate) unsafe fn fetch(
        &self,
        stream: &Stream,
        io: &StepIo,
        packed: Slice<u8>,
    ) -> Result<(), CudaError> {
        let from = [self.packers[0].source(), self.packers[1].source()];
        // SAFETY: the caller keeps the description; the ring lives as long as the lane.
        unsafe { io.fetch(stream, from, self.turn, packed) }
    }

    /// Queues the results' way back.
    ///
    /// # Safety
    /// As [`fetch`](Self::fetch), for the same step.
    pub(crate) unsafe fn deliver(
        &self,
        stream: &Stream,
        io: &StepIo,
        packed: Slice<u8>,
        outcome: &Outcome,
    ) -> Result<(), CudaError> {
        let delivery = Delivery {
            description: packed.cast(),
            failed: outcome.failed,
            chosen: outcome.chosen,
            tops: outcome.tops,
            to: [self.results[0].mapped(), self.results[1].mapped()],
            chosen_at: self.chosen_at,
            tops_at: self.tops_at,
        };
        // SAFETY: as above.
        unsafe { io.deliver(stream, self.turn, &delivery) }
    }

    /// When a step ran, if its results are here.
    pub(crate) fn done(&self, buffer: usize, ticket: u64) -> Option<Done> {
        let ticket_at = std::mem::offset_of!(Done, ticket);
        let here = self.results[buffer].peek::<u64>(ticket_at) == ticket;
        here.then(|| self.results[buffer].peek(0))
    }

    /// Whether each row has failed.
    pub(crate) fn failed(&self, buffer: usize, rows: usize) -> &[u32] {
        self.results[buffer].elements(FAILED_AT, rows)
    }

    pub(crate) fn chosen(&self, buffer: usize, results: usize) -> &[Chosen] {
        self.results[buffer].elements(self.chosen_at, results)
    }

    /// Alternatives of one result.
    pub(crate) fn tops(&self, buffer: usize, result: usize) -> &[Top] {
        let at = self.tops_at + result * MAX_TOP * size_of::<Top>();
        self.results[buffer].elements(at, MAX_TOP)
    }
}
