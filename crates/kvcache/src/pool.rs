use spate_types::BlockId;

use crate::lru::LruList;

/// Who holds which block of one pool.
#[derive(Debug)]
pub(crate) struct Pool {
    /// Holders per block.
    refs: Vec<u32>,
    free: Vec<BlockId>,
    /// Published blocks without a holder, the least recently used first.
    cached: LruList,
    used: u32,
}

impl Pool {
    /// All blocks free.
    pub(crate) fn new(num_blocks: u32) -> Self {
        Self {
            refs: vec![0; num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            cached: LruList::new(num_blocks),
            used: 0,
        }
    }

    pub(crate) fn total(&self) -> u32 {
        self.refs.len() as u32
    }

    pub(crate) fn free(&self) -> u32 {
        self.free.len() as u32
    }

    pub(crate) fn cached(&self) -> u32 {
        self.cached.len()
    }

    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// Blocks that can be allocated: free and cached ones.
    pub(crate) fn available(&self) -> u32 {
        self.free() + self.cached()
    }

    pub(crate) fn holders(&self, block: BlockId) -> u32 {
        self.refs[block.0 as usize]
    }

    /// How many of `blocks` nobody holds.
    pub(crate) fn unreferenced(&self, blocks: &[BlockId]) -> u32 {
        let unheld = blocks.iter().filter(|&&block| self.holders(block) == 0);
        unheld.count() as u32
    }

    /// One more holder of a block that has some, or is cached.
    pub(crate) fn hold(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        if *refs == 0 {
            self.cached.remove(block);
            self.used += 1;
        }
        *refs += 1;
    }

    /// One holder less. A block without one is cached if it is `published`, and free otherwise.
    pub(crate) fn release(&mut self, block: BlockId, published: bool) {
        let refs = &mut self.refs[block.0 as usize];
        *refs = refs
            .checked_sub(1)
            .expect("a block is released only by a holder");
        if *refs > 0 {
            return;
        }
        self.used -= 1;
        if published {
            self.cached.push(block);
        } else {
            self.free.push(block);
        }
    }

    /// A block with one holder, and whether it was cached: then it must be unpublished.
    pub(crate) fn allocate(&mut self) -> Option<(BlockId, bool)> {
        let free = self.free.pop().map(|block| (block, false));
        let (block, evicted) = free.or_else(|| Some((self.cached.pop()?, true)))?;
        self.refs[block.0 as usize] = 1;
        self.used += 1;
        Some((block, evicted))
    }

    /// A block is published no more.
    pub(crate) fn unpublish(&mut self, block: BlockId) {
        if self.holders(block) == 0 {
            self.cached.remove(block);
            self.free.push(block);
        }
    }

    /// Recounts everything. `held` yields each hold.
    ///
    /// # Panics
    /// With a message if an invariant is broken.
    pub(crate) fn check(
        &self,
        held: impl IntoIterator<Item = BlockId>,
        published: impl Fn(BlockId) -> bool,
    ) {
        let mut refs = vec![0u32; self.refs.len()];
        for block in held {
            refs[block.0 as usize] += 1;
        }
        let mut used = 0;
        for (i, (&expected, &actual)) in refs.iter().zip(&self.refs).enumerate() {
            assert_eq!(
                actual, expected,
                "block {i}: counted holders differ from its holders"
            );
            let block = BlockId(i as u32);
            let cached = actual == 0 && published(block);
            assert_eq!(
                self.cached.contains(block),
                cached,
                "block {i}: wrongly (not) cached"
            );
            used += u32::from(actual > 0);
        }
        let mut seen = vec![false; self.refs.len()];
        for &block in &self.free {
            let doubled = std::mem::replace(&mut seen[block.0 as usize], true);
            let idle = self.holders(block) == 0 && !published(block);
            assert!(
                idle && !doubled,
                "block {}: wrongly in the free list",
                block.0
            );
        }
        assert_eq!(self.used, used, "used blocks miscounted");
        assert_eq!(
            self.free() + self.cached() + self.used,
            self.total(),
            "blocks lost or doubled"
        );
    }
}
