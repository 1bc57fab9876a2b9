use spate_types::BlockId;

const NONE: u32 = u32::MAX;

/// An ordered set of blocks, oldest first: a doubly linked list threaded through one array, so that
/// every operation is O(1).
#[derive(Debug)]
pub(crate) struct LruList {
    /// Per block, then one sentinel that closes the ring: (previous, next).
    links: Vec<(u32, u32)>,
    len: u32,
}

impl LruList {
    pub(crate) fn new(num_blocks: u32) -> Self {
        let mut links = vec![(NONE, NONE); num_blocks as usize];
        links.push((num_blocks, num_blocks));
        Self { links, len: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    fn sentinel(&self) -> u32 {
        (self.links.len() - 1) as u32
    }

    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.links[block.0 as usize].0 != NONE
    }

    /// Adds `block` as the most recently used.
    pub(crate) fn push(&mut self, block: BlockId) {
        debug_assert!(!self.contains(block), "block {} is in the list", block.0);
        let end = self.sentinel();
        let last = self.links[end as usize].0;
        self.links[block.0 as usize] = (last, end);
        self.links[last as usize].1 = block.0;
        self.links[end as usize].0 = block.0;
        self.len += 1;
    }

    pub(crate) fn remove(&mut self, block: BlockId) {
        debug_assert!(self.contains(block), "block {} is not in the list", block.0);
        let (previous, next) = self.links[block.0 as usize];
        self.links[previous as usize].1 = next;
        self.links[next as usize].0 = previous;
        self.links[block.0 as usize] = (NONE, NONE);
        self.len -= 1;
    }

    /// Removes and returns the least recently used.
    pub(crate) fn pop(&mut self) -> Option<BlockId> {
        let first = self.links[self.sentinel() as usize].1;
        if first == self.sentinel() {
            return None;
        }
        self.remove(BlockId(first));
        Some(BlockId(first))
    }
}
