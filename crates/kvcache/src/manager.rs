use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;

use spate_types::{BlockId, BlockIds, TokenId};

use crate::PrefixIndex;
use crate::lru::LruList;

/// One sequence's blocks, in position order. Give it back with [`BlockManager::release`]: a table
/// that is merely dropped leaks its blocks.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: BlockIds,
    /// The first so many blocks are entries of the prefix index, each the parent of the next.
    published: usize,
    salt: Option<Arc<str>>,
}

impl BlockTable {
    /// The blocks, as a batch takes them.
    pub fn blocks(&self) -> &BlockIds {
        &self.blocks
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether it holds no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// Published blocks that a sequence can begin with. Valid until the manager changes.
#[derive(Debug, Default)]
pub struct PrefixMatch {
    blocks: Vec<BlockId>,
    unreferenced: u32,
}

impl PrefixMatch {
    /// Number of blocks found.
    pub fn len(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Whether none was found.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// How many of them nobody holds now: adopting them lowers [`BlockManager::available`] by this.
    pub fn unreferenced(&self) -> u32 {
        self.unreferenced
    }
}

/// Too few free and cached blocks; nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBlocks;

/// Owns the state of every block of the pool.
#[derive(Debug)]
pub struct BlockManager<S = RandomState> {
    block_size: u32,
    /// Holders per block.
    refs: Vec<u32>,
    free: Vec<BlockId>,
    /// Published blocks without a holder. A table gives its blocks up last one first, and every
    /// holder of a block holds its parents too, so a parent always comes after its children here:
    /// plain LRU order evicts leaves first.
    cached: LruList,
    used: u32,
    /// `None` when prefix caching is off.
    index: Option<PrefixIndex<S>>,
}

impl BlockManager {
    /// All blocks free.
    ///
    /// # Panics
    /// If `block_size` is 0.
    pub fn new(num_blocks: u32, block_size: u32, prefix_caching: bool) -> Self {
        let index =
            prefix_caching.then(|| PrefixIndex::new(num_blocks, block_size, RandomState::new()));
        Self::with_index(num_blocks, block_size, index)
    }
}

impl<S: BuildHasher> BlockManager<S> {
    /// Like [`BlockManager::new`] with an index of the caller's making (its own hasher).
    ///
    /// # Panics
    /// If `block_size` is 0.
    pub fn with_index(num_blocks: u32, block_size: u32, index: Option<PrefixIndex<S>>) -> Self {
        assert!(block_size > 0, "a block holds at least one token");
        Self {
            block_size,
            refs: vec![0; num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            cached: LruList::new(num_blocks),
            used: 0,
            index,
        }
    }

    /// Tokens per block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Blocks in the pool.
    pub fn total(&self) -> u32 {
        self.refs.len() as u32
    }

    /// Blocks that are free.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks that are only held by the prefix index.
    pub fn cached(&self) -> u32 {
        self.cached.len()
    }

    /// Blocks that are held by tables.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// Blocks that can be allocated: free and cached ones.
    pub fn available(&self) -> u32 {
        self.free() + self.cached()
    }

    /// Blocks that hold `positions` positions.
    pub fn blocks_for(&self, positions: u32) -> u32 {
        positions.div_ceil(self.block_size)
    }

    /// The longest published beginning of `tokens`, in whole blocks and always short of the last
    /// token: that one must be computed to get logits.
    pub fn lookup(&self, salt: Option<&Arc<str>>, tokens: &[TokenId]) -> PrefixMatch {
        let Some(index) = &self.index else {
            return PrefixMatch::default();
        };
        let blocks = index.lookup(salt, &tokens[..tokens.len().saturating_sub(1)]);
        let unreferenced = blocks
            .iter()
            .filter(|b| self.refs[b.0 as usize] == 0)
            .count() as u32;
        PrefixMatch {
            blocks,
            unreferenced,
        }
    }

    /// Begins a table with the blocks of `found`.
    pub fn adopt(&mut self, found: PrefixMatch, salt: Option<Arc<str>>) -> BlockTable {
        for &block in &found.blocks {
            self.hold(block);
        }
        BlockTable {
            published: found.blocks.len(),
            blocks: Arc::new(found.blocks),
            salt,
        }
    }

    /// Makes positions `start .. end` of `table` writable: appends blocks, and replaces the block of
    /// `start` by a fresh one if somebody else may read it (copy-on-write). All or nothing.
    ///
    /// The returned `(src, dst)` is a copy that must run before the write. The caller takes over the
    /// table's hold on `src` and gives it up with [`release_block`](Self::release_block) once the
    /// copy has run.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when too few blocks are available.
    pub fn reserve(
        &mut self,
        table: &mut BlockTable,
        start: u32,
        end: u32,
    ) -> Result<Option<(BlockId, BlockId)>, OutOfBlocks> {
        let first = (start / self.block_size) as usize;
        debug_assert!(
            start < end && first <= table.len(),
            "positions {start}..{end} leave a gap"
        );
        let missing = (self.blocks_for(end) as usize).saturating_sub(table.len());
        let shared = table
            .blocks
            .get(first)
            .copied()
            .filter(|&block| self.is_shared(block));
        let needed = missing + usize::from(shared.is_some());
        if needed > self.available() as usize {
            return Err(OutOfBlocks);
        }
        if needed == 0 {
            return Ok(None);
        }
        let blocks = Arc::make_mut(&mut table.blocks);
        let mut copy = None;
        if let Some(src) = shared {
            let dst = self.allocate();
            blocks[first] = dst;
            table.published = table.published.min(first);
            copy = Some((src, dst));
        }
        for _ in 0..missing {
            blocks.push(self.allocate());
        }
        Ok(copy)
    }

    /// A second table over the blocks that hold the first `positions` positions of `table`. The full
    /// ones among them must have been [published](Self::publish), lest the two tables come to
    /// disagree about a block's parent.
    pub fn fork(&mut self, table: &BlockTable, positions: u32) -> BlockTable {
        let full = (positions / self.block_size) as usize;
        assert!(
            self.index.is_none() || table.published >= full,
            "publish before you fork"
        );
        let blocks = table.blocks[..self.blocks_for(positions) as usize].to_vec();
        for &block in &blocks {
            self.hold(block);
        }
        BlockTable {
            published: table.published.min(blocks.len()),
            blocks: Arc::new(blocks),
            salt: table.salt.clone(),
        }
    }

    /// Publishes the full blocks of `table` that are not yet; `tokens` are the sequence's tokens
    /// whose KV is known to be written (its step was committed).
    ///
    /// Where another sequence published the same tokens first, the table changes over to that
    /// block. The blocks it held until now are returned: batches in flight may still read them, so
    /// the caller gives them up, with [`release_block`](Self::release_block), when those are done.
    #[must_use = "the replaced blocks must be released"]
    pub fn publish(&mut self, table: &mut BlockTable, tokens: &[TokenId]) -> Vec<BlockId> {
        let mut replaced = Vec::new();
        let size = self.block_size as usize;
        for i in table.published..tokens.len() / size {
            let Some(index) = &mut self.index else {
                break;
            };
            let own = table.blocks[i];
            table.published = i + 1;
            let parent = i.checked_sub(1).map(|p| table.blocks[p]);
            let block_tokens = &tokens[i * size..(i + 1) * size];
            if let Some(shared) = index.insert(parent, table.salt.as_ref(), block_tokens, own) {
                self.hold(shared);
                Arc::make_mut(&mut table.blocks)[i] = shared;
                replaced.push(own);
            }
        }
        replaced
    }

    /// Gives up a table's hold on all its blocks.
    pub fn release(&mut self, table: BlockTable) {
        // Last block first: see `cached`.
        for &block in table.blocks.iter().rev() {
            self.release_block(block);
        }
    }

    /// Gives up one hold on one block. An unpublished block without a holder is free; a published
    /// one is cached.
    pub fn release_block(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        *refs = refs
            .checked_sub(1)
            .expect("a block is released only by a holder");
        if *refs > 0 {
            return;
        }
        self.used -= 1;
        if self.is_published(block) {
            self.cached.push(block);
        } else {
            self.free.push(block);
        }
    }

    fn is_published(&self, block: BlockId) -> bool {
        self.index
            .as_ref()
            .is_some_and(|index| index.contains(block))
    }

    /// Whether anybody but one table can read `block`, now or (through the index) later.
    fn is_shared(&self, block: BlockId) -> bool {
        self.refs[block.0 as usize] > 1 || self.is_published(block)
    }

    fn hold(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        if *refs == 0 {
            self.cached.remove(block);
            self.used += 1;
        }
        *refs += 1;
    }

    fn allocate(&mut self) -> BlockId {
        let block = self
            .free
            .pop()
            .or_else(|| self.evict())
            .expect("the caller counted them");
        self.refs[block.0 as usize] = 1;
        self.used += 1;
        block
    }

    fn evict(&mut self) -> Option<BlockId> {
        let block = self.cached.pop()?;
        self.index
            .as_mut()
            .expect("only published blocks are cached")
            .remove(block);
        Some(block)
    }

    /// Recounts everything. `held` yields each hold that the caller has: every block of every
    /// table, and what it took over from [`reserve`](Self::reserve) and [`publish`](Self::publish).
    ///
    /// # Panics
    /// With a message if an invariant is broken.
    pub fn check_invariants(&self, held: impl IntoIterator<Item = BlockId>) {
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
            let cached = actual == 0 && self.is_published(block);
            assert_eq!(
                self.cached.contains(block),
                cached,
                "block {i}: wrongly (not) cached"
            );
            used += u32::from(actual > 0);
            if let Some(parent) = self.index.as_ref().and_then(|index| index.parent(block)) {
                assert!(
                    self.is_published(parent),
                    "block {i}: its parent is not published"
                );
                let parent_held = self.refs[parent.0 as usize] > 0;
                assert!(
                    actual == 0 || parent_held,
                    "block {i}: held, but its parent is not"
                );
            }
        }
        let mut seen = vec![false; self.refs.len()];
        for &block in &self.free {
            let doubled = std::mem::replace(&mut seen[block.0 as usize], true);
            let idle = self.refs[block.0 as usize] == 0 && !self.is_published(block);
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
        let published = self.index.as_ref().map_or(0, PrefixIndex::len);
        assert!(
            published <= (used + self.cached()) as usize,
            "index holds unknown blocks"
        );
    }
}
