use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;

use spate_types::{BlockId, TokenId};

/// What a published block is known by. Two blocks hold the same KV only if all of this is equal;
/// equality of a hash is never taken for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    /// The published block of the positions before, which stands for all tokens before: it stays
    /// published at least as long as this one.
    parent: Option<BlockId>,
    /// Who may share it.
    salt: Option<Arc<str>>,
    /// The tokens of this block.
    tokens: Vec<TokenId>,
}

/// Finds published blocks by the tokens they hold.
///
/// The index is a forest: an entry's parent is the entry of the block before it. An entry is named
/// by its block, so a parent must not be removed before its children; [`crate::BlockManager`]
/// sees to that by evicting leaves first.
///
/// `S` is the hasher of the table; tests inject a bad one to force collisions.
#[derive(Debug)]
pub struct PrefixIndex<S = RandomState> {
    block_size: usize,
    blocks: HashMap<Arc<Key>, BlockId, S>,
    /// The way back, per block of the pool.
    keys: Vec<Option<Arc<Key>>>,
}

impl<S: BuildHasher> PrefixIndex<S> {
    /// An empty index for a pool of `num_blocks` blocks of `block_size` tokens.
    pub fn new(num_blocks: u32, block_size: u32, hasher: S) -> Self {
        Self {
            block_size: block_size as usize,
            blocks: HashMap::with_hasher(hasher),
            keys: vec![None; num_blocks as usize],
        }
    }

    /// The longest chain of published blocks that `tokens` begins with.
    pub fn lookup(&self, salt: Option<&Arc<str>>, tokens: &[TokenId]) -> Vec<BlockId> {
        let mut found = Vec::new();
        // One key, refilled for each block: a lookup allocates once however long the prompt is.
        let mut probe = Key {
            parent: None,
            salt: salt.cloned(),
            tokens: Vec::with_capacity(self.block_size),
        };
        for chunk in tokens.chunks_exact(self.block_size) {
            probe.tokens.clear();
            probe.tokens.extend_from_slice(chunk);
            let Some(&block) = self.blocks.get(&probe) else {
                break;
            };
            found.push(block);
            probe.parent = Some(block);
        }
        found
    }

    /// Publishes `block`, which holds `tokens` after `parent`. If an equal block is published
    /// already, that one is returned and nothing changes.
    pub fn insert(
        &mut self,
        parent: Option<BlockId>,
        salt: Option<&Arc<str>>,
        tokens: &[TokenId],
        block: BlockId,
    ) -> Option<BlockId> {
        debug_assert_eq!(tokens.len(), self.block_size, "only full blocks are shared");
        debug_assert!(
            parent.is_none_or(|p| self.contains(p)),
            "parent not published"
        );
        debug_assert!(!self.contains(block), "block {} is published", block.0);
        let key = Arc::new(Key {
            parent,
            salt: salt.cloned(),
            tokens: tokens.to_vec(),
        });
        if let Some(&existing) = self.blocks.get(&key) {
            return Some(existing);
        }
        self.keys[block.0 as usize] = Some(Arc::clone(&key));
        self.blocks.insert(key, block);
        None
    }

    /// Forgets `block`, which must not be the parent of another entry.
    pub fn remove(&mut self, block: BlockId) {
        if let Some(key) = self.keys[block.0 as usize].take() {
            self.blocks.remove(&key);
        }
    }

    /// Whether `block` is published.
    pub fn contains(&self, block: BlockId) -> bool {
        self.keys[block.0 as usize].is_some()
    }

    /// Number of published blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is published.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The published block before `block`.
    pub fn parent(&self, block: BlockId) -> Option<BlockId> {
        self.keys[block.0 as usize]
            .as_ref()
            .and_then(|key| key.parent)
    }
}
