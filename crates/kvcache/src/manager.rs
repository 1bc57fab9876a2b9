use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;

use spate_types::{BlockId, BlockIds, LocalBlocks, TokenId};

use crate::PrefixIndex;
use crate::local::LocalPool;
use crate::pool::Pool;

/// One sequence's blocks, in position order. Give it back with [`BlockManager::release`]: a table
/// that is merely dropped leaks its blocks.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: BlockIds,
    /// The first so many blocks are entries of the prefix index, each the parent of the next.
    published: usize,
    salt: Option<Arc<str>>,
    local: LocalBlocks,
}

impl BlockTable {
    /// The blocks, as a batch takes them.
    pub fn blocks(&self) -> &BlockIds {
        &self.blocks
    }

    /// The blocks in the pool of layers with a sliding window; empty where there is none.
    pub fn local(&self) -> &LocalBlocks {
        &self.local
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
    /// Twins of the last of `blocks`.
    local: Vec<BlockId>,
    local_unreferenced: u32,
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

    /// Number of local blocks found.
    pub fn local_len(&self) -> u32 {
        self.local.len() as u32
    }

    /// As [`unreferenced`](Self::unreferenced), of the local blocks.
    pub fn local_unreferenced(&self) -> u32 {
        self.local_unreferenced
    }
}

/// Too few free and cached blocks; nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutOfBlocks {
    /// In the main pool.
    Main,
    /// In the pool of layers with a sliding window.
    Local,
}

/// Copies `(src, dst)` that must run before a reserved range is written. The caller takes over the
/// table's hold on each `src` and gives it up, with [`BlockManager::release_block`] or
/// [`BlockManager::release_local_block`], once the copy has run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copies {
    /// In the main pool.
    pub main: Option<(BlockId, BlockId)>,
    /// In the pool of layers with a sliding window.
    pub local: Option<(BlockId, BlockId)>,
}

/// Owns the state of every block.
#[derive(Debug)]
pub struct BlockManager<S = RandomState> {
    block_size: u32,
    /// A table gives its blocks up last one first, and every holder of a block holds its parents
    /// too, so among the cached ones a parent always comes after its children: plain LRU order
    /// evicts leaves first.
    pool: Pool,
    /// `None` when prefix caching is off.
    index: Option<PrefixIndex<S>>,
    /// `None` when all layers keep all positions.
    local: Option<LocalPool>,
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
            pool: Pool::new(num_blocks),
            index,
            local: None,
        }
    }

    /// Adds a pool of `num_blocks` blocks for layers that see only the last `window` positions.
    ///
    /// # Panics
    /// If `window` is 0.
    #[must_use]
    pub fn with_local(mut self, num_blocks: u32, window: u32) -> Self {
        let local = LocalPool::new(num_blocks, window, self.block_size, self.total());
        self.local = Some(local);
        self
    }

    /// Tokens per block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Blocks in the main pool.
    pub fn total(&self) -> u32 {
        self.pool.total()
    }

    /// Blocks that are free.
    pub fn free(&self) -> u32 {
        self.pool.free()
    }

    /// Blocks that are only held by the prefix index.
    pub fn cached(&self) -> u32 {
        self.pool.cached()
    }

    /// Blocks that are held by tables.
    pub fn used(&self) -> u32 {
        self.pool.used()
    }

    /// Blocks that can be allocated: free and cached ones.
    pub fn available(&self) -> u32 {
        self.pool.available()
    }

    /// Local blocks that are held by tables.
    pub fn local_used(&self) -> u32 {
        self.local.as_ref().map_or(0, |local| local.pool.used())
    }

    /// Local blocks that can be allocated. Without a local pool there are always enough.
    pub fn local_available(&self) -> u32 {
        let local = self.local.as_ref();
        local.map_or(u32::MAX, |local| local.pool.available())
    }

    /// Blocks that hold `positions` positions.
    pub fn blocks_for(&self, positions: u32) -> u32 {
        positions.div_ceil(self.block_size)
    }

    /// The longest published beginning of `tokens`, in whole blocks and always short of the last
    /// token: that one must be computed to get logits. Where layers have a window, what the next
    /// position sees must be there for them too.
    pub fn lookup(&self, salt: Option<&Arc<str>>, tokens: &[TokenId]) -> PrefixMatch {
        let Some(index) = &self.index else {
            return PrefixMatch::default();
        };
        let mut found = PrefixMatch {
            blocks: index.lookup(salt, &tokens[..tokens.len().saturating_sub(1)]),
            ..PrefixMatch::default()
        };
        if let Some(local) = &self.local {
            let (usable, twins) = local.usable(&found.blocks);
            found.blocks.truncate(usable);
            found.local_unreferenced = local.pool.unreferenced(&twins);
            found.local = twins;
        }
        found.unreferenced = self.pool.unreferenced(&found.blocks);
        found
    }

    /// Begins a table with the blocks of `found`.
    pub fn adopt(&mut self, found: PrefixMatch, salt: Option<Arc<str>>) -> BlockTable {
        for &block in &found.blocks {
            self.pool.hold(block);
        }
        let first = found.blocks.len() - found.local.len();
        if let Some(local) = &mut self.local {
            found.local.iter().for_each(|&block| local.pool.hold(block));
        }
        BlockTable {
            published: found.blocks.len(),
            blocks: Arc::new(found.blocks),
            salt,
            local: LocalBlocks {
                first: first as u32,
                blocks: Arc::new(found.local),
            },
        }
    }

    /// Appends blocks of the main pool until `table` has them for `end` positions. All or nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks::Main`] when too few are available.
    pub fn extend(&mut self, table: &mut BlockTable, end: u32) -> Result<(), OutOfBlocks> {
        let missing = (self.blocks_for(end) as usize).saturating_sub(table.len());
        if missing > self.available() as usize {
            return Err(OutOfBlocks::Main);
        }
        if missing > 0 {
            let blocks = Arc::make_mut(&mut table.blocks);
            blocks.extend((0..missing).map(|_| self.allocate()));
        }
        Ok(())
    }

    /// Makes positions `start .. end` of `table` writable, in both pools: appends blocks, and
    /// replaces the block of `start` by a fresh one if somebody else may read it (copy-on-write).
    /// All or nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when too few blocks are available.
    pub fn reserve(
        &mut self,
        table: &mut BlockTable,
        start: u32,
        end: u32,
    ) -> Result<Copies, OutOfBlocks> {
        let first = (start / self.block_size) as usize;
        debug_assert!(
            start < end && first <= table.len(),
            "positions {start}..{end} leave a gap"
        );
        let end_block = self.blocks_for(end) as usize;
        let own = table.blocks.get(first).copied();
        let shared = own.filter(|&block| self.is_shared(block));
        let needed = end_block.saturating_sub(table.len()) + usize::from(shared.is_some());
        if needed > self.available() as usize {
            return Err(OutOfBlocks::Main);
        }
        let mut copies = Copies::default();
        if let Some(local) = &mut self.local {
            copies.local = reserve_local(local, &mut table.local, first, end_block)?;
        }
        if let Some(src) = shared {
            let dst = self.allocate();
            Arc::make_mut(&mut table.blocks)[first] = dst;
            table.published = table.published.min(first);
            copies.main = Some((src, dst));
        }
        self.extend(table, end)?;
        Ok(copies)
    }

    /// Gives up the local blocks that no position from `position` on sees.
    pub fn trim(&mut self, table: &mut BlockTable, position: u32) {
        let Some(local) = &mut self.local else {
            return;
        };
        let own = &mut table.local;
        let gone = local
            .first_seen(position)
            .saturating_sub(own.first as usize)
            .min(own.blocks.len());
        if gone > 0 {
            own.first += gone as u32;
            for block in Arc::make_mut(&mut own.blocks).drain(..gone) {
                local.release(block);
            }
        }
    }

    /// Whether `table` still has the local blocks that a position sees.
    pub fn sees_back_from(&self, table: &BlockTable, position: u32) -> bool {
        let first = self.local.as_ref().map(|local| local.first_seen(position));
        first.is_none_or(|first| table.local.first as usize <= first)
    }

    /// A second table over the blocks that hold the first `positions` positions of `table`. The full
    /// ones among them must have been [published](Self::publish), lest the two tables come to
    /// disagree about a block's parent. The second goes on where it
    /// [sees back from](Self::sees_back_from).
    pub fn fork(&mut self, table: &BlockTable, positions: u32) -> BlockTable {
        let full = (positions / self.block_size) as usize;
        assert!(
            self.index.is_none() || table.published >= full,
            "publish before you fork"
        );
        let blocks = table.blocks[..self.blocks_for(positions) as usize].to_vec();
        for &block in &blocks {
            self.pool.hold(block);
        }
        let mut local = table.local.clone();
        if let Some(pool) = &mut self.local {
            let kept = blocks.len().saturating_sub(local.first as usize);
            Arc::make_mut(&mut local.blocks).truncate(kept);
            let held = local.blocks.iter();
            held.for_each(|&block| pool.pool.hold(block));
        }
        BlockTable {
            published: table.published.min(blocks.len()),
            blocks: Arc::new(blocks),
            salt: table.salt.clone(),
            local,
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
                self.pool.hold(shared);
                Arc::make_mut(&mut table.blocks)[i] = shared;
                replaced.push(own);
            }
            // Where the shared block has a twin, the table keeps its own local one all the same, to
            // itself: it holds the same, and is given up before long.
            if let (Some(local), Some(own)) = (&mut self.local, table.local.get(i)) {
                local.publish(table.blocks[i], own);
            }
        }
        replaced
    }

    /// Gives up a table's hold on all its blocks.
    pub fn release(&mut self, table: BlockTable) {
        // Last block first: see `pool`.
        for &block in table.blocks.iter().rev() {
            self.release_block(block);
        }
        for &block in table.local.blocks.iter().rev() {
            self.release_local_block(block);
        }
    }

    /// Gives up one hold on one block. An unpublished block without a holder is free; a published
    /// one is cached.
    pub fn release_block(&mut self, block: BlockId) {
        self.pool.release(block, self.is_published(block));
    }

    /// The same of a local block.
    pub fn release_local_block(&mut self, block: BlockId) {
        let local = self.local.as_mut().expect("local blocks are of its pool");
        local.release(block);
    }

    fn is_published(&self, block: BlockId) -> bool {
        self.index
            .as_ref()
            .is_some_and(|index| index.contains(block))
    }

    /// Whether anybody but one table can read `block`, now or (through the index) later.
    fn is_shared(&self, block: BlockId) -> bool {
        self.pool.holders(block) > 1 || self.is_published(block)
    }

    fn allocate(&mut self) -> BlockId {
        let (block, evicted) = self.pool.allocate().expect("the caller counted them");
        if evicted {
            self.index
                .as_mut()
                .expect("only published blocks are cached")
                .remove(block);
            if let Some(local) = &mut self.local {
                local.unpublish(block);
            }
        }
        block
    }

    /// Recounts everything. `held` yields each hold that the caller has: every block of every
    /// table, and what it took over from [`reserve`](Self::reserve) and [`publish`](Self::publish);
    /// `held_local` the same of local blocks.
    ///
    /// # Panics
    /// With a message if an invariant is broken.
    pub fn check_invariants(
        &self,
        held: impl IntoIterator<Item = BlockId>,
        held_local: impl IntoIterator<Item = BlockId>,
    ) {
        self.pool.check(held, |block| self.is_published(block));
        for block in (0..self.total()).map(BlockId) {
            let Some(parent) = self.index.as_ref().and_then(|index| index.parent(block)) else {
                continue;
            };
            assert!(
                self.is_published(parent),
                "block {}: its parent is not published",
                block.0
            );
            assert!(
                self.pool.holders(block) == 0 || self.pool.holders(parent) > 0,
                "block {}: held, but its parent is not",
                block.0
            );
        }
        let published = self.index.as_ref().map_or(0, PrefixIndex::len);
        assert!(
            published <= (self.used() + self.cached()) as usize,
            "index holds unknown blocks"
        );
        if let Some(local) = &self.local {
            local.check(held_local, |block| self.is_published(block));
        }
    }
}

/// The local half of [`BlockManager::reserve`], for blocks `first .. end` of a sequence.
fn reserve_local(
    pool: &mut LocalPool,
    own: &mut LocalBlocks,
    first: usize,
    end: usize,
) -> Result<Option<(BlockId, BlockId)>, OutOfBlocks> {
    let shared = own.get(first).filter(|&block| pool.is_shared(block));
    let missing = end.saturating_sub(own.end());
    let needed = missing + usize::from(shared.is_some());
    if needed > pool.pool.available() as usize {
        return Err(OutOfBlocks::Local);
    }
    if needed == 0 {
        return Ok(None);
    }
    let mut allocate = || pool.allocate().expect("they were counted");
    let at = first.saturating_sub(own.first as usize);
    let blocks = Arc::make_mut(&mut own.blocks);
    let copy = shared.map(|src| {
        let dst = allocate();
        blocks[at] = dst;
        (src, dst)
    });
    blocks.extend((0..missing).map(|_| allocate()));
    Ok(copy)
}
