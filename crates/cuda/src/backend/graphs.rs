use std::time::Duration;

use crate::CudaError;
use crate::driver::{Graph, Slice, Stream};

/// Most tokens of a step that is not queued kernel by kernel: with more, the host is fast enough.
const MOST_TOKENS: usize = 1024;

/// How a step is queued. Numbers are indices into lists of [`Bucket`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// As one graph: every row decodes and samples, and nothing else happens.
    Whole(usize),
    /// As a graph up to the hidden states of all tokens and one from there on, or kernel by kernel.
    Parts {
        hidden: Option<usize>,
        outputs: Option<usize>,
    },
}

/// Steps, or parts of steps, with so many rows or tokens: captured once, replayed with one call. A smaller
/// one is padded.
pub(crate) struct Bucket {
    pub(crate) size: usize,
    /// Whether it keeps to a part of the GPU, beside what runs on the rest.
    pub(crate) beside: bool,
    /// How long the last step took.
    pub(crate) busy: Duration,
    graph: Graph,
    /// What it reads of the description of a step.
    read: Slice<u8>,
}

impl Bucket {
    pub(crate) fn new(size: usize, beside: bool, graph: Graph, read: Slice<u8>) -> Self {
        Self {
            size,
            beside,
            busy: Duration::ZERO,
            graph,
            read,
        }
    }

    /// Queues a step that was padded to this bucket; `read`: what the graph reads of its description.
    ///
    /// # Safety
    /// What the lane's steps touch is allocated.
    pub(crate) unsafe fn launch(&self, stream: &Stream, read: Slice<u8>) -> Result<(), CudaError> {
        // The graph knows its arrays by address: they are packed in the same order, with the same sizes.
        let place = |s: &Slice<u8>| (s.address(), s.len());
        assert_eq!(place(&read), place(&self.read), "a padded step");
        // SAFETY: the caller vouches for the memory.
        unsafe { self.graph.launch(stream) }
    }
}

/// Tokens of buckets of mixed steps, ascending, up to `most`: whole tiles of matrix products.
pub(crate) fn token_sizes(most: usize) -> Vec<usize> {
    let most = most.min(MOST_TOKENS);
    let few = [16, 32].into_iter();
    let sizes = few.chain((64..).step_by(64));
    let mut sizes: Vec<usize> = sizes.take_while(|&size| size < most).collect();
    sizes.push(most);
    sizes
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
    use super::{sizes, token_sizes};

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

    #[test]
    fn buckets_of_tokens_are_tiles_of_products() {
        assert_eq!(token_sizes(8), [8]);
        assert_eq!(token_sizes(100), [16, 32, 64, 100]);
        let sizes = token_sizes(8192);
        assert!(sizes.is_sorted_by(|a, b| a < b) && sizes.last() == Some(&1024));
        assert!(sizes[2..].iter().all(|size| size % 64 == 0));
    }
}
