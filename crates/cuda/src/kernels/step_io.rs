use super::{Chosen, Top, image};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream};

/// Buffers of the host's ring, each way.
pub const RING: usize = 2;

/// Byte of a host buffer at which the results' first part begins; [`Done`] lies before it.
pub const FAILED_AT: usize = 256;

const THREADS: u32 = 256;

/// Few: they occupy the GPU while they wait.
const MASK_BLOCKS: u32 = 8;

/// Byte of a host buffer of masks at which they begin; the ticket of their step lies before them.
pub const MASKS_AT: usize = 256;

/// What the GPU counts; zero at first.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Turn {
    steps: u32,
    arrived: u32,
    started: u64,
}

// SAFETY: numbers, laid out as in step_io.cu.
unsafe impl Plain for Turn {}

/// The start of a host buffer of results.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Done {
    /// When the step began, in nanoseconds of the device's clock.
    pub started: u64,
    /// When its results were there.
    pub ended: u64,
    /// Which step; written last.
    pub ticket: u64,
}

// SAFETY: numbers, laid out as in step_io.cu.
unsafe impl Plain for Done {}

/// A step's results, and where they go.
#[derive(Clone, Copy)]
pub struct Delivery {
    /// Begins with the step's ticket.
    pub description: Slice<u64>,
    /// One per row.
    pub failed: Slice<u32>,
    /// All results.
    pub chosen: Slice<Chosen>,
    /// As [`super::SampleTile::tops`], for each of `chosen`.
    pub tops: Slice<Top>,
    /// The host's buffers: [`Done`], then `failed` at [`FAILED_AT`], then the two others.
    pub to: [Slice<u8>; RING],
    /// Byte at which `chosen` begins.
    pub chosen_at: usize,
    /// Byte at which `tops` begins.
    pub tops_at: usize,
}

/// `Results` of step_io.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Results {
    rows: u32,
    results: u32,
    chosen_at: u32,
    tops_at: u32,
}

// SAFETY: four numbers, as the kernel declares them.
unsafe impl Plain for Results {}

/// A step's way to the GPU and back.
pub struct StepIo {
    fetch: Kernel,
    fetch_masks: Kernel,
    deliver: Kernel,
}

impl StepIo {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("step_io"))?;
        Ok(Self {
            fetch: module.kernel(c"fetch_step")?,
            fetch_masks: module.kernel(c"fetch_masks")?,
            deliver: module.kernel(c"deliver_step")?,
        })
    }

    /// Copies a description from the host's buffer whose turn it is.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive, and the buffer unchanged, until the kernel has run.
    ///
    /// # Panics
    /// If the buffers are smaller than `to`, or that is not made of vectors of 16 bytes.
    pub unsafe fn fetch(
        &self,
        stream: &Stream,
        from: [Slice<u8>; RING],
        turn: Slice<Turn>,
        to: Slice<u8>,
    ) -> Result<(), CudaError> {
        assert!(to.len().is_multiple_of(16) && turn.len() == 1);
        assert!(from.iter().all(|from| from.len() >= to.len()));
        let vectors = (to.len() / 16) as u32;
        let [even, odd] = from;
        let shape = grid(vectors);
        // SAFETY: the types are those of step_io.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe {
            self.fetch
                .launch(stream, shape, &(even, odd, vectors, turn, to))
        }
    }

    /// Waits for the step's masks in the host's buffer whose turn it is, and copies them. `description`
    /// begins with the step's ticket and the number of its masks, each of so many words.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive, and what was written to the buffer unchanged, until the kernel has run; there
    /// is room for the masks.
    pub unsafe fn fetch_masks(
        &self,
        stream: &Stream,
        description: Slice<u64>,
        from: [Slice<u8>; RING],
        words: usize,
        turn: Slice<Turn>,
        to: Slice<u32>,
    ) -> Result<(), CudaError> {
        assert!(description.len() >= 2 && turn.len() == 1);
        let [even, odd] = from;
        let arguments = (description, even, odd, words as u32, turn, to);
        let shape = Shape::new(MASK_BLOCKS, THREADS);
        // SAFETY: as above.
        unsafe { self.fetch_masks.launch(stream, shape, &arguments) }
    }

    /// Copies the results to the host's buffer whose turn it is, says so there, and gives the turn to
    /// the other.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive, and the buffer unused, until the kernel has run.
    ///
    /// # Panics
    /// If a buffer is too small.
    pub unsafe fn deliver(
        &self,
        stream: &Stream,
        turn: Slice<Turn>,
        d: &Delivery,
    ) -> Result<(), CudaError> {
        assert!(turn.len() == 1 && !d.description.is_empty());
        assert!(d.tops.len() == d.chosen.len() * super::MAX_TOP);
        assert!(FAILED_AT + d.failed.bytes() <= d.chosen_at);
        assert!(d.chosen_at + d.chosen.bytes() <= d.tops_at);
        assert!(d.to.iter().all(|to| to.len() >= d.tops_at + d.tops.bytes()));
        assert!(d.chosen_at.is_multiple_of(16) && d.tops_at.is_multiple_of(16));
        let results = Results {
            rows: d.failed.len() as u32,
            results: d.chosen.len() as u32,
            chosen_at: d.chosen_at as u32,
            tops_at: d.tops_at as u32,
        };
        let [even, odd] = d.to;
        let arguments = (
            d.description,
            results,
            d.failed,
            d.chosen,
            d.tops,
            turn,
            even,
            odd,
        );
        let shape = grid(d.chosen.len() as u32);
        // SAFETY: as above.
        unsafe { self.deliver.launch(stream, shape, &arguments) }
    }
}

/// Enough blocks to fill the bus.
fn grid(items: u32) -> Shape {
    Shape::new(items.div_ceil(THREADS).clamp(1, 32), THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What step_io.cu declares.
    #[test]
    fn layouts_are_those_of_the_kernel() {
        assert_eq!((size_of::<Turn>(), size_of::<Results>()), (16, 16));
        assert_eq!(std::mem::offset_of!(Turn, started), 8);
        assert_eq!(std::mem::offset_of!(Done, ticket), 16);
        assert!(size_of::<Done>() <= FAILED_AT);
    }
}
