//! The block manager by example, with hash collisions, and against a naive model.
#![allow(clippy::unwrap_used)]

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use proptest::prelude::*;
use spate_kvcache::{BlockManager, BlockTable, Copies, OutOfBlocks, PrefixIndex};
use spate_types::{BlockId, TokenId};

/// Takes a sequence in as the scheduler does: cached prefix, then fresh blocks, all published.
fn run<S: BuildHasher>(
    blocks: &mut BlockManager<S>,
    salt: Option<&str>,
    tokens: &[TokenId],
) -> (BlockTable, u32) {
    let salt: Option<Arc<str>> = salt.map(Arc::from);
    let found = blocks.lookup(salt.as_ref(), tokens);
    let hits = found.len();
    let mut table = blocks.adopt(found, salt);
    let cached = hits * blocks.block_size();
    blocks
        .reserve(&mut table, cached, tokens.len() as u32)
        .unwrap();
    for block in blocks.publish(&mut table, tokens) {
        blocks.release_block(block);
    }
    (table, hits)
}

fn ids(table: &BlockTable) -> Vec<u32> {
    table.blocks().iter().map(|block| block.0).collect()
}

#[test]
fn a_prefix_is_shared_but_for_the_last_token() {
    let mut blocks = BlockManager::new(8, 2, true);
    let (first, hits) = run(&mut blocks, None, &[1, 2, 3, 4]);
    assert_eq!((ids(&first), hits), (vec![0, 1], 0));
    // The second block is published, but holds the last token.
    let found = blocks.lookup(None, &[1, 2, 3, 4]);
    assert_eq!((found.len(), found.unreferenced()), (1, 0));
    assert_eq!(blocks.lookup(None, &[1, 2, 3, 4, 5]).len(), 2);
    // Equal tokens after other tokens are something else.
    assert_eq!(blocks.lookup(None, &[3, 4, 5]).len(), 0);
    blocks.release(first);
    assert_eq!((blocks.free(), blocks.cached(), blocks.used()), (6, 2, 0));
    assert_eq!(blocks.lookup(None, &[1, 2, 3, 4, 5]).unreferenced(), 2);
}

#[test]
fn salts_do_not_share() {
    let mut blocks = BlockManager::new(8, 2, true);
    let (a, _) = run(&mut blocks, Some("a"), &[1, 2, 3, 4, 5]);
    for other in [None, Some("b"), Some("")] {
        let other: Option<Arc<str>> = other.map(Arc::from);
        assert_eq!(blocks.lookup(other.as_ref(), &[1, 2, 3, 4, 5]).len(), 0);
    }
    assert_eq!(
        blocks.lookup(Some(&Arc::from("a")), &[1, 2, 3, 4, 5]).len(),
        2
    );
    blocks.release(a);
}

/// Every key has the same hash.
#[derive(Clone, Copy)]
struct Collide;

impl Hasher for Collide {
    fn finish(&self) -> u64 {
        0
    }
    fn write(&mut self, _: &[u8]) {}
}

impl BuildHasher for Collide {
    type Hasher = Self;
    fn build_hasher(&self) -> Self {
        *self
    }
}

#[test]
fn hash_collisions_never_hit() {
    let index = PrefixIndex::new(16, 2, Collide);
    let mut blocks = BlockManager::with_index(16, 2, Some(index));
    let sequences: [(Option<&str>, [TokenId; 5]); 5] = [
        (None, [1, 2, 3, 4, 0]),
        (None, [2, 1, 3, 4, 0]),
        (None, [1, 2, 4, 3, 0]),
        (Some("a"), [1, 2, 3, 4, 0]),
        (Some("b"), [1, 2, 3, 4, 0]),
    ];
    let hits = sequences.map(|(salt, tokens)| {
        let (table, hits) = run(&mut blocks, salt, &tokens);
        blocks.release(table);
        hits
    });
    // Only the true common beginning [1, 2] of the first and third is shared.
    assert_eq!(hits, [0, 0, 1, 0, 0]);
    for (salt, tokens) in sequences {
        assert_eq!(
            blocks.lookup(salt.map(Arc::from).as_ref(), &tokens).len(),
            2
        );
    }
    blocks.check_invariants([], []);
}

#[test]
fn the_second_to_publish_changes_over_to_the_first() {
    let mut blocks = BlockManager::new(8, 2, true);
    let tokens = [1, 2, 3];
    let start = |blocks: &mut BlockManager| {
        let found = blocks.lookup(None, &tokens);
        let mut table = blocks.adopt(found, None);
        blocks.reserve(&mut table, 0, 3).unwrap();
        table
    };
    let (mut a, mut b) = (start(&mut blocks), start(&mut blocks));
    assert!(blocks.publish(&mut a, &tokens).is_empty());
    let replaced = blocks.publish(&mut b, &tokens);
    assert_eq!(replaced, [BlockId(2)]);
    assert_eq!((ids(&a), ids(&b)), (vec![0, 1], vec![0, 3]));
    assert_eq!(
        blocks.used(),
        4,
        "a batch may still read the replaced block"
    );
    blocks.release_block(replaced[0]);
    assert_eq!(blocks.used(), 3);
    blocks.release(a);
    blocks.release(b);
    blocks.check_invariants([], []);
}

#[test]
fn a_shared_block_is_copied_before_it_is_written() {
    let mut blocks = BlockManager::new(4, 4, true);
    let (mut a, _) = run(&mut blocks, None, &[1, 2, 3, 4, 5]);
    let mut b = blocks.fork(&a, 5);
    assert_eq!(ids(&a), ids(&b));
    let copies = blocks.reserve(&mut b, 4, 5).unwrap();
    assert_eq!(copies.main, Some((BlockId(1), BlockId(2))));
    blocks.release_block(BlockId(1));
    assert_eq!((ids(&a), ids(&b)), (vec![0, 1], vec![0, 2]));
    assert_eq!(
        blocks.reserve(&mut a, 5, 6),
        Ok(Copies::default()),
        "it is the only holder now"
    );
    // A published block is never written, though nobody else holds it.
    let copies = blocks.reserve(&mut b, 3, 4).unwrap();
    assert_eq!(copies.main, Some((BlockId(0), BlockId(3))));
    assert_eq!(blocks.reserve(&mut b, 8, 9), Err(OutOfBlocks::Main));
    blocks.release_block(BlockId(0));
    blocks.check_invariants(a.blocks().iter().chain(b.blocks().iter()).copied(), []);
}

#[test]
fn without_caching_nothing_is_kept() {
    let mut blocks = BlockManager::new(4, 2, false);
    let (table, _) = run(&mut blocks, None, &[1, 2, 3, 4, 5]);
    blocks.release(table);
    assert_eq!((blocks.free(), blocks.cached()), (4, 0));
    assert!(blocks.lookup(None, &[1, 2, 3, 4, 5]).is_empty());
}

const POOL: u32 = 10;
const SIZE: usize = 2;

/// A published block, by all tokens up to its end.
type Path = (usize, Vec<TokenId>);

#[derive(Clone, PartialEq)]
enum NaiveBlock {
    Private(u64),
    Published(Path),
}

#[derive(Clone)]
struct NaiveTable {
    salt: usize,
    tokens: Vec<TokenId>,
    blocks: Vec<NaiveBlock>,
}

/// The same bookkeeping by brute force: sharing is a scan, eviction looks at everything.
#[derive(Default)]
struct Naive {
    tables: Vec<NaiveTable>,
    /// Published blocks and when they were last given up.
    published: Vec<(Path, u64)>,
    clock: u64,
}

impl Naive {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn holders(&self, block: &NaiveBlock) -> usize {
        self.tables
            .iter()
            .flat_map(|t| &t.blocks)
            .filter(|b| *b == block)
            .count()
    }

    fn is_published(&self, path: &Path) -> bool {
        self.published.iter().any(|(p, _)| p == path)
    }

    fn cached(&self) -> Vec<&(Path, u64)> {
        let unheld = |p: &Path| self.holders(&NaiveBlock::Published(p.clone())) == 0;
        self.published
            .iter()
            .filter(|(path, _)| unheld(path))
            .collect()
    }

    fn used(&self) -> u32 {
        let mut seen: Vec<&NaiveBlock> = Vec::new();
        for block in self.tables.iter().flat_map(|t| &t.blocks) {
            if !seen.contains(&block) {
                seen.push(block);
            }
        }
        seen.len() as u32
    }

    fn free(&self) -> u32 {
        POOL - self.used() - self.cached().len() as u32
    }

    fn lookup(&self, salt: usize, tokens: &[TokenId]) -> Vec<Path> {
        (1..=(tokens.len() - 1) / SIZE)
            .map(|n| (salt, tokens[..n * SIZE].to_vec()))
            .take_while(|path| self.is_published(path))
            .collect()
    }

    /// Makes sure of a free block: evicts the least recently used leaf.
    fn make_free(&mut self) {
        if self.free() > 0 {
            return;
        }
        let is_leaf = |path: &Path| {
            let child = |other: &Path| {
                other.0 == path.0 && other.1.len() > path.1.len() && other.1.starts_with(&path.1)
            };
            !self.published.iter().any(|(other, _)| child(other))
        };
        let leaves = self.cached().into_iter().filter(|(path, _)| is_leaf(path));
        let victim = leaves.min_by_key(|(_, used)| *used).unwrap().0.clone();
        self.published.retain(|(path, _)| *path != victim);
    }

    /// `None` when blocks are short; otherwise whether a copy was made.
    fn reserve(&mut self, i: usize, start: usize, end: usize) -> Option<bool> {
        let table = &self.tables[i];
        let missing = end.div_ceil(SIZE).saturating_sub(table.blocks.len());
        let old = table.blocks.get(start / SIZE).cloned();
        let shared = old
            .clone()
            .filter(|block| self.holders(block) > 1 || matches!(block, NaiveBlock::Published(_)));
        let need = missing + usize::from(shared.is_some());
        if need > self.free() as usize + self.cached().len() {
            return None;
        }
        if shared.is_some() {
            self.make_free();
            let fresh = NaiveBlock::Private(self.tick());
            self.tables[i].blocks[start / SIZE] = fresh;
        }
        // The source of the copy is given up only after all blocks were taken.
        let source = shared.clone().map(|block| NaiveTable {
            salt: 0,
            tokens: Vec::new(),
            blocks: vec![block],
        });
        self.tables.extend(source);
        for _ in 0..missing {
            self.make_free();
            let fresh = NaiveBlock::Private(self.tick());
            self.tables[i].blocks.push(fresh);
        }
        if shared.is_some() {
            self.release(self.tables.len() - 1);
        }
        Some(shared.is_some())
    }

    fn publish(&mut self, i: usize) {
        let NaiveTable { salt, tokens, .. } = self.tables[i].clone();
        for n in 0..tokens.len() / SIZE {
            let path = (salt, tokens[..(n + 1) * SIZE].to_vec());
            if !self.is_published(&path) {
                self.published.push((path.clone(), 0));
            }
            self.tables[i].blocks[n] = NaiveBlock::Published(path);
        }
    }

    fn release(&mut self, i: usize) {
        while let Some(block) = self.tables[i].blocks.pop() {
            let now = self.tick();
            if let NaiveBlock::Published(path) = &block
                && self.holders(&block) == 0
            {
                self.published
                    .iter_mut()
                    .find(|(p, _)| p == path)
                    .unwrap()
                    .1 = now;
            }
        }
        self.tables.remove(i);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Start { salt: usize, tokens: Vec<TokenId> },
    Append { table: usize, token: TokenId },
    Rewrite { table: usize },
    Publish { table: usize },
    Fork { table: usize },
    Release { table: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let table = 0..8usize;
    prop_oneof![
        3 => (0..2usize, prop::collection::vec(0..2u32, 1..9))
            .prop_map(|(salt, tokens)| Op::Start { salt, tokens }),
        3 => (table.clone(), 0..2u32).prop_map(|(table, token)| Op::Append { table, token }),
        1 => table.clone().prop_map(|table| Op::Rewrite { table }),
        3 => table.clone().prop_map(|table| Op::Publish { table }),
        1 => table.clone().prop_map(|table| Op::Fork { table }),
        3 => table.prop_map(|table| Op::Release { table }),
    ]
}

struct Both {
    real: BlockManager,
    tables: Vec<BlockTable>,
    naive: Naive,
    salts: [Option<Arc<str>>; 2],
}

impl Both {
    fn apply(&mut self, op: Op) {
        if let Op::Start { salt, tokens } = op {
            return self.start(salt, tokens);
        }
        let (Op::Append { table, .. }
        | Op::Rewrite { table }
        | Op::Publish { table }
        | Op::Fork { table }
        | Op::Release { table }) = op
        else {
            return;
        };
        if self.tables.is_empty() {
            return;
        }
        let i = table % self.tables.len();
        let len = self.naive.tables[i].tokens.len();
        match op {
            Op::Append { token, .. } => {
                if self.reserve(i, len, len + 1) {
                    self.naive.tables[i].tokens.push(token);
                }
            }
            Op::Rewrite { .. } => {
                self.reserve(i, len - 1, len);
            }
            Op::Publish { .. } => self.publish(i),
            Op::Fork { .. } => {
                self.publish(i);
                let fork = self.real.fork(&self.tables[i], len as u32);
                self.tables.push(fork);
                let fork = self.naive.tables[i].clone();
                self.naive.tables.push(fork);
            }
            Op::Release { .. } => {
                self.real.release(self.tables.remove(i));
                self.naive.release(i);
            }
            Op::Start { .. } => unreachable!("handled above"),
        }
    }

    fn publish(&mut self, i: usize) {
        let tokens = self.naive.tables[i].tokens.clone();
        for block in self.real.publish(&mut self.tables[i], &tokens) {
            self.real.release_block(block);
        }
        self.naive.publish(i);
    }

    fn start(&mut self, salt: usize, tokens: Vec<TokenId>) {
        let found = self.real.lookup(self.salts[salt].as_ref(), &tokens);
        let expected = self.naive.lookup(salt, &tokens);
        assert_eq!(found.len() as usize, expected.len(), "lookup of {tokens:?}");
        let cached = self.naive.cached();
        let unheld = cached
            .iter()
            .filter(|(path, _)| expected.contains(path))
            .count();
        assert_eq!(found.unreferenced() as usize, unheld);
        let hits = expected.len() * SIZE;
        self.tables
            .push(self.real.adopt(found, self.salts[salt].clone()));
        let blocks = expected.into_iter().map(NaiveBlock::Published).collect();
        let end = tokens.len();
        self.naive.tables.push(NaiveTable {
            salt,
            tokens,
            blocks,
        });
        let i = self.tables.len() - 1;
        if !self.reserve(i, hits, end) {
            self.real.release(self.tables.remove(i));
            self.naive.release(i);
        }
    }

    fn reserve(&mut self, i: usize, start: usize, end: usize) -> bool {
        let real = self
            .real
            .reserve(&mut self.tables[i], start as u32, end as u32);
        let copy = real.ok().map(|copies| copies.main);
        if let Some(Some((src, _))) = copy {
            self.real.release_block(src);
        }
        let naive = self.naive.reserve(i, start, end);
        assert_eq!(copy.map(|copy| copy.is_some()), naive, "copied or not");
        naive.is_some()
    }

    fn compare(&self) {
        let naive = &self.naive;
        assert_eq!(self.real.used(), naive.used());
        assert_eq!(self.real.cached() as usize, naive.cached().len());
        assert_eq!(self.real.free(), naive.free());
        self.real.check_invariants(
            self.tables.iter().flat_map(|t| t.blocks().iter().copied()),
            [],
        );
        for (table, other) in self.tables.iter().zip(&naive.tables) {
            assert_eq!(table.len(), other.blocks.len());
            for (a, x) in table.blocks().iter().zip(&other.blocks) {
                let shares = self
                    .tables
                    .iter()
                    .flat_map(|t| t.blocks().iter())
                    .filter(|b| *b == a);
                assert_eq!(shares.count(), naive.holders(x), "shared differently");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn behaves_like_the_naive_model(ops in prop::collection::vec(op(), 1..80)) {
        let mut both = Both {
            real: BlockManager::new(POOL, SIZE as u32, true),
            tables: Vec::new(),
            naive: Naive::default(),
            salts: [None, Some(Arc::from("s"))],
        };
        for op in ops {
            both.apply(op);
            both.compare();
        }
        while let Some(table) = both.tables.pop() {
            both.real.release(table);
        }
        prop_assert_eq!(both.real.used(), 0);
    }
}
