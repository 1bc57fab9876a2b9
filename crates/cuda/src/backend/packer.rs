use crate::CudaError;
use crate::driver::{Arena, Device, Pinned, Plain, Slice};

/// Alignment of each piece.
const ALIGN: usize = 256;

/// Many small arrays on their way to the GPU as one copy.
pub(crate) struct Packer {
    host: Pinned<u8>,
    device: Slice<u8>,
    used: usize,
}

impl Packer {
    /// Packs up to as many bytes as `device` has room for.
    pub(crate) fn new(on: &Device, device: Slice<u8>) -> Result<Self, CudaError> {
        Ok(Self {
            host: Pinned::new(on, device.len())?,
            device,
            used: 0,
        })
    }

    /// Bytes that arrays of these sizes take.
    pub(crate) fn room_for(arrays: &[usize]) -> usize {
        arrays
            .iter()
            .map(|bytes| bytes.next_multiple_of(ALIGN))
            .sum()
    }

    /// Forgets what was packed. What was copied from here must have arrived.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }

    /// Whether there is room for an array.
    pub(crate) fn has_room_for<T>(&self, data: &[T]) -> bool {
        self.used + size_of_val(data) <= self.host.len()
    }

    /// Adds an array; gives the place where it will be.
    pub(crate) fn put<T: Plain>(&mut self, data: &[T]) -> Result<Slice<T>, CudaError> {
        let (start, bytes) = (self.used, size_of_val(data));
        let end = start + bytes;
        if end > self.host.len() {
            return Err(CudaError::Config(format!(
                "a step's description needs more than {} bytes",
                self.host.len()
            )));
        }
        // SAFETY: the array's bytes are readable, plain types have no padding that matters, and the
        // target was checked to have room and can't overlap borrowed data.
        unsafe {
            let to = self.host.as_mut_ptr().add(start);
            to.copy_from_nonoverlapping(data.as_ptr().cast(), bytes);
        }
        self.used = end.next_multiple_of(ALIGN).min(self.host.len());
        Ok(self.device.range(start..end).cast())
    }

    /// Where everything packed will be.
    pub(crate) fn packed(&self) -> Slice<u8> {
        self.device.range(0..self.used)
    }

    /// Where the GPU finds what it is to copy.
    pub(crate) fn source(&self) -> Slice<u8> {
        self.host.mapped()
    }
}

/// Device memory for a [`Packer`].
pub(crate) fn take(arena: &mut Arena, bytes: usize) -> Result<Slice<u8>, CudaError> {
    arena.take(bytes.next_multiple_of(ALIGN))
}
