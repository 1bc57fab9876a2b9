//! Who gives way when blocks are short.

use spate_executor::{Capacity, Lane, LocalKv};
use spate_scheduler::SchedulerConfig;
use spate_types::{FinishReason, GenerationRequest, RequestId, Slot};

use crate::bench::{Bench, capacity, config, request};

#[test]
fn the_last_in_line_gives_way_and_comes_back_in_its_slot() {
    let small = Capacity {
        blocks: 4,
        max_batch_tokens: 16,
        ..capacity()
    };
    let config = SchedulerConfig {
        max_batch_tokens: 16,
        prefix_caching: false,
        ..config()
    };
    let mut bench = Bench::new(config, small);
    bench.add(request(1, 8, 8)); // will need the whole pool
    bench.add(request(2, 3, 4)); // one block, later two
    assert_eq!(bench.plan(), ["s0 0..8 bind *", "s1 0..3 bind *"]);
    bench.commit(&[Some(1), Some(2)]);
    assert_eq!(bench.plan(), ["s0 8..9 last *", "s1 3..4 last *"]);
    bench.commit(&[Some(1), Some(2)]);
    // The pool is used up. The second can't grow, but nobody needs what it has.
    for row in ["s0 9..10 last *", "s0 10..11 last *", "s0 11..12 last *"] {
        assert_eq!(bench.plan(), [row]);
        bench.commit(&[Some(1)]);
    }
    assert_eq!(bench.scheduler.stats().preemptions, 0);
    assert_eq!(bench.plan(), ["s0 12..13 last *"]);
    assert_eq!(bench.scheduler.stats().preemptions, 1);
    bench.commit(&[Some(1)]);
    for row in ["s0 13..14 last *", "s0 14..15 last *"] {
        assert_eq!(bench.plan(), [row]);
        bench.commit(&[Some(1)]);
    }
    assert_eq!(bench.finished(), [(1, 0, FinishReason::Length)]);
    // Prompt and output are computed again, in the same slot without a bind.
    assert_eq!(bench.plan(), ["s1 0..5 *"]);
    bench.commit(&[Some(2)]);
    assert_eq!(bench.plan(), ["s1 5..6 last *"]);
    bench.commit(&[Some(2)]);
    assert!(bench.scheduler.is_idle());
    assert_eq!(bench.usage(2).unwrap().completion_tokens, 4);
}

#[test]
fn the_youngest_of_the_lowest_priority_gives_way_first() {
    for priorities in [[0, 0, 0], [0, 2, 1], [0, 1, 1]] {
        let small = Capacity {
            blocks: 3,
            ..capacity()
        };
        let config = SchedulerConfig {
            prefix_caching: false,
            ..config()
        };
        let mut bench = Bench::new(config, small);
        let [a, b, c] = priorities;
        bench.add(GenerationRequest {
            priority: a,
            ..request(1, 4, 8)
        });
        bench.add(GenerationRequest {
            priority: b,
            ..request(2, 2, 3)
        });
        bench.add(GenerationRequest {
            priority: c,
            ..request(3, 2, 3)
        });
        // Slots are given in line order, so slot 2 is the last in line.
        assert_eq!(
            bench.plan(),
            ["s0 0..4 bind *", "s1 0..2 bind *", "s2 0..2 bind *"]
        );
        bench.commit(&[Some(1), Some(1), Some(1)]);
        assert_eq!(
            bench.plan(),
            ["s0 4..5 last *", "s1 2..3 last *"],
            "{priorities:?}"
        );
        let preempted = if b > c { 2 } else { 3 };
        bench
            .scheduler
            .finish(RequestId(preempted), None, FinishReason::Abort, bench.now);
        assert_eq!(bench.scheduler.stats().waiting, 0, "{priorities:?}");
    }
}

/// With a window of 8 positions, in a pool of 8 blocks of 4.
fn windowed() -> Capacity {
    Capacity {
        blocks: 40,
        local: Some(LocalKv {
            window: 8,
            blocks: 8,
        }),
        ..capacity()
    }
}

#[test]
fn a_long_prompt_takes_no_more_local_blocks_than_its_window_and_a_step() {
    let mut bench = Bench::new(config(), windowed());
    bench.add(request(1, 40, 2));
    for start in (0..40).step_by(8) {
        let row = bench.plan_batch(Lane::Main).unwrap().rows.remove(0);
        assert_eq!((row.start, row.end()), (start, start + 8));
        // The position before sees the 7 before it; those of a sibling would begin there.
        assert_eq!(row.local.first, start.saturating_sub(8) / 4);
        assert_eq!(
            row.local.end(),
            row.blocks.len().min(row.end() as usize / 4)
        );
        let stats = bench.scheduler.stats();
        let held = row.local.blocks.len() as u32;
        assert_eq!(
            (stats.local_blocks_used, stats.local_blocks_total),
            (held, 8)
        );
        bench.commit(&[(start == 32).then_some(1)]);
    }
    // It ended, and its prompt is found but for the block of its last token.
    bench.plan();
    bench.commit(&[Some(1)]);
    assert_eq!(bench.finished(), [(1, 0, FinishReason::Length)]);
    bench.add(request(1, 40, 2));
    assert_eq!(bench.plan(), ["s1 36..40 bind *"]);
}

#[test]
fn the_first_in_line_gets_its_local_blocks_from_the_last() {
    let mut preemptions = 0;
    for (first, second) in [(3, 1), (2, 3), (3, 2), (1, 4)] {
        let mut bench = Bench::new(config(), windowed());
        bench.add(request(1, first, 30));
        bench.add(request(2, second, 30));
        bench.plan();
        bench.commit(&[Some(1), Some(1)]);
        let mut urgent = request(3, 40, 2);
        urgent.priority = -1;
        bench.add(urgent);
        // The two decode on and need more and more, until one must give way.
        let mut end = 0;
        while end < 40 {
            let batch = bench.plan_batch(Lane::Main).unwrap();
            let row = batch.rows.iter().find(|row| row.slot == Slot(2));
            let row = row.expect("the urgent prompt is in every step");
            assert_eq!(row.start, end);
            end = row.end();
            let samples = batch.rows.iter().map(|row| row.sample.then_some(1));
            bench.commit(&samples.collect::<Vec<_>>());
        }
        preemptions += bench.scheduler.stats().preemptions;
    }
    assert_eq!(preemptions, 4);
}
