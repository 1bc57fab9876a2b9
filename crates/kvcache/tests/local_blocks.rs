//! The pool of layers with a sliding window: what a table holds there, and which prefixes are found.
#![allow(clippy::unwrap_used)]

use spate_kvcache::{BlockManager, BlockTable, Copies, OutOfBlocks};
use spate_types::{BlockId, TokenId};

const SIZE: u32 = 2;
const WINDOW: u32 = 5;

fn manager(main: u32, local: u32) -> BlockManager {
    BlockManager::new(main, SIZE, true).with_local(local, WINDOW)
}

fn tokens(n: u32) -> Vec<TokenId> {
    (100..100 + n).collect()
}

/// Takes a sequence in as the scheduler does, `chunk` positions a step. Also gives the length of the
/// prefix that was found.
fn run(blocks: &mut BlockManager, tokens: &[TokenId], chunk: u32) -> (BlockTable, u32) {
    let found = blocks.lookup(None, tokens);
    let cached = found.len() * SIZE;
    let mut table = blocks.adopt(found, None);
    let len = tokens.len() as u32;
    blocks.extend(&mut table, len).unwrap();
    let mut start = cached;
    while start < len {
        let end = len.min(start + chunk);
        let copies = blocks.reserve(&mut table, start, end).unwrap();
        assert_eq!(copies, Copies::default());
        for block in blocks.publish(&mut table, &tokens[..end as usize]) {
            blocks.release_block(block);
        }
        blocks.trim(&mut table, end - 1);
        start = end;
    }
    check(blocks, &[&table]);
    (table, cached)
}

fn check(blocks: &BlockManager, tables: &[&BlockTable]) {
    let main = tables.iter().flat_map(|t| t.blocks().iter().copied());
    let local = tables.iter().flat_map(|t| t.local().blocks.iter().copied());
    blocks.check_invariants(main, local);
}

#[test]
fn a_table_holds_what_its_window_sees() {
    let mut blocks = manager(20, 5);
    let (table, _) = run(&mut blocks, &tokens(21), 4);
    assert_eq!(table.len(), 11);
    // Position 20 sees 16 to 20: blocks 8, 9 and 10.
    assert_eq!((table.local().first, table.local().blocks.len()), (8, 3));
    assert_eq!((blocks.used(), blocks.local_used()), (11, 3));
    assert!(blocks.sees_back_from(&table, 20) && !blocks.sees_back_from(&table, 19));
    blocks.release(table);
    assert_eq!((blocks.used(), blocks.local_used()), (0, 0));
    assert_eq!((blocks.available(), blocks.local_available()), (20, 5));
    check(&blocks, &[]);
}

#[test]
fn a_prefix_is_found_as_far_as_its_last_window_is_there() {
    let mut blocks = manager(20, 8);
    let (table, _) = run(&mut blocks, &tokens(21), 2);
    blocks.release(table);
    // Behind block 10, a position sees two blocks and a token; the twins of 8 and 9 are the newest.
    let found = blocks.lookup(None, &tokens(23));
    assert_eq!((found.len(), found.local_len()), (10, 2));
    assert_eq!((found.unreferenced(), found.local_unreferenced()), (10, 2));

    // All but the newest three local blocks go.
    let (other, _) = run(&mut blocks, &[1, 2, 3, 4, 5, 6, 7, 8, 9], 9);
    assert_eq!(blocks.lookup(None, &tokens(23)).len(), 10);
    assert_eq!(
        blocks.lookup(None, &tokens(15)).len(),
        0,
        "their last window is gone"
    );
    blocks.release(other);
    let (table, cached) = run(&mut blocks, &tokens(23), 2);
    assert_eq!(cached, 20);
    blocks.release(table);

    // All of them.
    let (other, _) = run(&mut blocks, &(0..16).collect::<Vec<_>>(), 16);
    assert_eq!(blocks.lookup(None, &tokens(23)).len(), 0);
    blocks.release(other);
    // Computed again, the blocks of the main pool are shared and get twins again.
    let (table, cached) = run(&mut blocks, &tokens(23), 2);
    assert_eq!(cached, 0);
    blocks.release(table);
    assert_eq!(blocks.lookup(None, &tokens(23)).len(), 11);
    check(&blocks, &[]);
}

#[test]
fn a_window_of_one_needs_nothing_before() {
    let mut blocks = BlockManager::new(10, SIZE, true).with_local(4, 1);
    let (table, _) = run(&mut blocks, &tokens(9), 1);
    let found = blocks.lookup(None, &tokens(12));
    assert_eq!((found.len(), found.local_len()), (4, 0));
    let second = blocks.adopt(found, None);
    assert_eq!(second.local().first, 4);
    check(&blocks, &[&table, &second]);
    blocks.release(second);
    blocks.release(table);
}

#[test]
fn a_block_that_leaves_the_main_pool_takes_its_twin_along() {
    let mut blocks = manager(5, 6);
    let (table, _) = run(&mut blocks, &tokens(10), 10);
    blocks.release(table);
    let (table, _) = run(&mut blocks, &[1, 2, 3], 3);
    assert_eq!(blocks.lookup(None, &tokens(11)).len(), 3, "the leaves went");
    check(&blocks, &[&table]);
    blocks.release(table);
}

#[test]
fn forks_share_the_window_and_copy_what_they_write() {
    let mut blocks = manager(20, 6);
    let (mut a, _) = run(&mut blocks, &tokens(9), 3);
    let mut b = blocks.fork(&a, 9);
    assert_eq!(b.local(), a.local());
    // Both write position 8, or behind it in the same block: the first to come copies.
    let copies = blocks.reserve(&mut b, 8, 9).unwrap();
    let (main, local) = (copies.main.unwrap(), copies.local.unwrap());
    assert_eq!(
        (main.0, local.0),
        (a.blocks()[4], a.local().get(4).unwrap())
    );
    assert_eq!(
        (main.1, local.1),
        (b.blocks()[4], b.local().get(4).unwrap())
    );
    blocks.release_block(main.0);
    blocks.release_local_block(local.0);
    assert_eq!(blocks.reserve(&mut a, 9, 10), Ok(Copies::default()));
    check(&blocks, &[&a, &b]);
    blocks.release(a);
    blocks.release(b);
    check(&blocks, &[]);
}

#[test]
fn when_local_blocks_are_short_nothing_changes() {
    let mut blocks = manager(20, 4);
    let (mut table, _) = run(&mut blocks, &tokens(5), 5);
    let before: Vec<BlockId> = table.blocks().to_vec();
    assert_eq!(blocks.reserve(&mut table, 5, 11), Err(OutOfBlocks::Local));
    assert_eq!(
        (table.blocks().as_slice(), table.local().end()),
        (&*before, 3)
    );
    check(&blocks, &[&table]);
    blocks.reserve(&mut table, 5, 8).unwrap();
    assert_eq!((table.len(), table.local().end()), (4, 4));
    blocks.release(table);
}
