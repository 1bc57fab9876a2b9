//! Paged, reference-counted, prefix-shared KV-cache block bookkeeping. Owns no device memory.
//!
//! A [`BlockManager`] hands out fixed-size blocks of a pool. Each sequence has a [`BlockTable`];
//! several tables may share a block, and whoever writes a shared block gets a copy first. Full
//! blocks that were computed are *published* in the [`PrefixIndex`], where later sequences with the
//! same beginning find them. A published block that nobody references stays cached until its memory
//! is needed; the least recently used goes first.
//!
//! Every block is in one of three states, and `free + cached + used == total` at all times:
//! - *free*: no table holds it and its content is worthless;
//! - *cached*: no table holds it, the index does;
//! - *used*: at least one table (or the caller, see [`BlockManager::release_block`]) holds it.
//!
//! Layers with a sliding window may keep their KV in a pool of their own, where a table holds only
//! the blocks that its window still sees ([`BlockManager::trim`]).

mod local;
mod lru;
mod manager;
mod pool;
mod prefix;

pub use manager::{BlockManager, BlockTable, Copies, OutOfBlocks, PrefixMatch};
pub use prefix::PrefixIndex;
