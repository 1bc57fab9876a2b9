use spate_executor::TokenMask;

use crate::CudaError;
use crate::driver::{Device, Pinned, Slice, Stream};
use crate::kernels::{MASKS_AT, RING, StepIo, Turn};

/// The way of masks to the steps that wait for them: written by the host while a step's forward pass runs,
/// read by a kernel before its sampler. By turns, as [`super::ring::Ring`].
pub(crate) struct Masks {
    buffers: [Pinned<u8>; RING],
    /// Words of a mask.
    words: usize,
    on_device: Slice<u32>,
}

impl Masks {
    /// Words of a mask for a vocabulary.
    pub(crate) fn words(vocab: usize) -> usize {
        vocab.div_ceil(32)
    }

    /// `on_device`: room for as many masks as a step may have.
    pub(crate) fn new(
        device: &Device,
        vocab: usize,
        on_device: Slice<u32>,
    ) -> Result<Self, CudaError> {
        let bytes = MASKS_AT + on_device.bytes();
        Ok(Self {
            buffers: [Pinned::new(device, bytes)?, Pinned::new(device, bytes)?],
            words: Self::words(vocab),
            on_device,
        })
    }

    /// Gives a step its masks. No other step's are in the buffer, or it has completed.
    pub(crate) fn give(&mut self, buffer: usize, ticket: u64, masks: &[TokenMask]) {
        let buffer = &mut self.buffers[buffer];
        let bytes = 4 * self.words;
        for (mask, to) in masks.iter().zip(buffer[MASKS_AT..].chunks_exact_mut(bytes)) {
            for (word, to) in mask.iter().zip(to.as_chunks_mut::<4>().0) {
                *to = word.to_ne_bytes();
            }
        }
        buffer.poke(0, ticket);
    }

    /// Queues the copy of a step's masks, which waits for them.
    ///
    /// # Safety
    /// `description` is the step's; the lane outlives it.
    pub(crate) unsafe fn fetch(
        &self,
        stream: &Stream,
        io: &StepIo,
        description: Slice<u8>,
        turn: Slice<Turn>,
    ) -> Result<(), CudaError> {
        let from = [self.buffers[0].mapped(), self.buffers[1].mapped()];
        // SAFETY: the caller keeps the description; a step has at most as many masks as rows.
        unsafe {
            let to = self.on_device;
            io.fetch_masks(stream, description.cast(), from, self.words, turn, to)
        }
    }

    /// All masks of a step.
    pub(crate) fn on_device(&self) -> Slice<u32> {
        self.on_device
    }
}
