use std::fmt;
use std::sync::Arc;

/// Index of a token in the model's vocabulary.
pub type TokenId = u32;

/// Names one request for the life of the process. Always made by the server: an id that a client
/// chose is never a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Names one of the `n` sequences of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId {
    /// The request it belongs to.
    pub request: RequestId,
    /// 0 .. `n`: the `index` of the choice in the response.
    pub index: u32,
}

/// Index of one fixed-size KV-cache block in the executor's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// A sequence's KV blocks in position order: block `i` holds positions
/// `i * block_size .. (i + 1) * block_size`.
///
/// Shared, because a batch in flight keeps the table it was planned with while the sequence grows.
/// A table only changes every `block_size` tokens, so an executor may use `Arc::ptr_eq` to learn
/// that nothing has to be uploaded.
pub type BlockIds = Arc<Vec<BlockId>>;

/// A sequence's blocks in the pool of layers with a sliding window, which see only the last positions:
/// block `i` of the sequence is `blocks[i - first]`, those before `first` are not kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalBlocks {
    /// Blocks of the sequence before the first one here.
    pub first: u32,
    /// The others, in position order.
    pub blocks: BlockIds,
}

impl LocalBlocks {
    /// Block `i` of the sequence, if it is kept.
    pub fn get(&self, i: usize) -> Option<BlockId> {
        let i = i.checked_sub(self.first as usize)?;
        self.blocks.get(i).copied()
    }

    /// Blocks of the sequence up to the last one here.
    pub fn end(&self) -> usize {
        self.first as usize + self.blocks.len()
    }
}

/// A sequence's place on the executor, kept from its first step to its end (through preemption
/// too): there live its last token, its sampling parameters and its penalty counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);
