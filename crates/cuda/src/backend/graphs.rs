use std::time::Duration;

use super::step::Step;
use crate::CudaError;
use crate::driver::{Graph, Slice, Stream};

/// Steps in which so many sequences decode and nothing else happens: captured once, replayed with
/// one call. A step of fewer rows is padded.
pub(crate) struct Bucket {
    pub(crate) rows: usize,
    /// Whether it keeps to a part of the GPU, beside what runs on the rest.
    pub(crate) beside: bool,
    /// How long the last step took.
    pub(crate) busy: Duration,
    graph: Graph,
    /// Where the description of the captured step was.
    packed: Slice<u8>,
}

impl Bucket {
    /// `step`: what was captured.
    pub(crate) fn new(rows: usize, beside: bool, graph: Graph, step: &Step) -> Self {
        Self {
            rows,
            beside,
            busy: Duration::ZERO,
            graph,
            packed: step.packed,
        }
    }

    /// Queues a step that was padded to this bucket.
    ///
    /// # Safety
    /// What the lane's steps touch is allocated.
    pub(crate) unsafe fn launch(&self, stream: &Stream, step: &Step) -> Result<(), CudaError> {
        // The graph knows its arrays by address: they are packed in the same order, with the same sizes.
        let same = |s: &Slice<u8>| (s.address(), s.len());
        assert_eq!(same(&step.packed), same(&self.packed), "a padded step");
        // SAFETY: the caller vouches for the memory.
        unsafe { self.graph.launch(stream) }
    }
}

/// Rows of buckets, ascending, up to `most`. The tiles of matrix products are 8 rows high at least, and
/// what padding costs beyond them is little beside reading the weights.
pub(crate) fn sizes(most: usize) -> Vec<usize> {
    let fine = [1, 2, 4].into_iter();
    let steps = fine.chain((8..64).step_by(8));
    let steps = steps.chain((64..256).step_by(16));
    let steps = steps.chain((256..).step_by(32));
    let mut sizes: Vec<usize> = steps.take_while(|&size| size < most).collect();
    sizes.push(most);
    sizes
}

#[cfg(test)]
mod tests {
    use super::sizes;

    #[test]
    fn buckets_ascend_to_the_largest_step() {
        assert_eq!(sizes(1), [1]);
        assert_eq!(sizes(16), [1, 2, 4, 8, 16]);
        for most in 1..700 {
            let sizes = sizes(most);
            assert!(sizes.is_sorted_by(|a, b| a < b) && sizes.last() == Some(&most));
            // Padding to the next bucket is never more than rows of one tile, or a fifth.
            assert!(sizes.windows(2).all(|w| w[1] - w[0] <= 8.max(w[0] / 4)));
        }
    }
}
