use spate_types::BlockId;

use crate::pool::Pool;

/// The pool of layers with a sliding window.
///
/// A published block of the main pool may have a *twin* here, which holds the same positions for
/// those layers. The two live and die apart: a twin is evicted when its own memory is needed (then
/// fewer sequences can begin behind it), and freed when its main block is unpublished.
#[derive(Debug)]
pub(crate) struct LocalPool {
    window: u32,
    block_size: u32,
    pub(crate) pool: Pool,
    /// Per block of the main pool.
    twins: Vec<Option<BlockId>>,
    /// The way back, per block here.
    mains: Vec<Option<BlockId>>,
}

impl LocalPool {
    pub(crate) fn new(num_blocks: u32, window: u32, block_size: u32, main_blocks: u32) -> Self {
        assert!(window > 0, "a query sees at least itself");
        Self {
            window,
            block_size,
            pool: Pool::new(num_blocks),
            twins: vec![None; main_blocks as usize],
            mains: vec![None; num_blocks as usize],
        }
    }

    /// The first block that holds a position seen from `position`.
    pub(crate) fn first_seen(&self, position: u32) -> usize {
        ((position + 1).saturating_sub(self.window) / self.block_size) as usize
    }

    /// The longest beginning of the chain `main` that a sequence can go on from: the twins of all
    /// that its next position sees are there. Its number of blocks, and those twins.
    pub(crate) fn usable(&self, main: &[BlockId]) -> (usize, Vec<BlockId>) {
        let (mut longest, mut first) = (0, 0);
        let mut unbroken = 0;
        for (i, block) in main.iter().enumerate() {
            let has_twin = self.twins[block.0 as usize].is_some();
            unbroken = if has_twin { unbroken + 1 } else { 0 };
            let seen = self.first_seen((i as u32 + 1) * self.block_size);
            if i + 1 - seen <= unbroken {
                (longest, first) = (i + 1, seen);
            }
        }
        let twins = main[first..longest].iter();
        let twins = twins.filter_map(|block| self.twins[block.0 as usize]);
        (longest, twins.collect())
    }

    /// Makes `block` the twin of a published main block, unless either has one.
    pub(crate) fn publish(&mut self, main: BlockId, block: BlockId) {
        let (twin, back) = (
            &mut self.twins[main.0 as usize],
            &mut self.mains[block.0 as usize],
        );
        if twin.is_none() && back.is_none() {
            (*twin, *back) = (Some(block), Some(main));
        }
    }

    /// A main block was unpublished.
    pub(crate) fn unpublish(&mut self, main: BlockId) {
        if let Some(block) = self.twins[main.0 as usize].take() {
            self.mains[block.0 as usize] = None;
            self.pool.unpublish(block);
        }
    }

    fn is_published(&self, block: BlockId) -> bool {
        self.mains[block.0 as usize].is_some()
    }

    /// Whether anybody but one table can read `block`, now or later.
    pub(crate) fn is_shared(&self, block: BlockId) -> bool {
        self.pool.holders(block) > 1 || self.is_published(block)
    }

    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let (block, evicted) = self.pool.allocate()?;
        if evicted && let Some(main) = self.mains[block.0 as usize].take() {
            self.twins[main.0 as usize] = None;
        }
        Some(block)
    }

    pub(crate) fn release(&mut self, block: BlockId) {
        self.pool.release(block, self.is_published(block));
    }

    /// See [`crate::BlockManager::check_invariants`]. `published` tells of main blocks.
    pub(crate) fn check(
        &self,
        held: impl IntoIterator<Item = BlockId>,
        published: impl Fn(BlockId) -> bool,
    ) {
        self.pool.check(held, |block| self.is_published(block));
        for (i, main) in self.mains.iter().enumerate() {
            let Some(main) = main else { continue };
            assert!(published(*main), "block {i}: twin of an unpublished block");
            let twin = self.twins[main.0 as usize];
            assert_eq!(twin, Some(BlockId(i as u32)), "twins disagree");
        }
        let twins = self.twins.iter().flatten().count();
        let mains = self.mains.iter().flatten().count();
        assert_eq!(twins, mains, "a twin without a way back");
    }
}
