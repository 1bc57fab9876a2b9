//! Several sequences of one request.

use std::sync::Arc;

use spate_executor::{Capacity, Lane};
use spate_scheduler::SchedulerConfig;
use spate_types::{FinishReason, GenerationRequest, RequestId, SamplingParams, Usage};

use crate::bench::{Bench, EOS, capacity, config, request};

#[test]
fn siblings_fork_from_the_computed_prompt() {
    let mut bench = Bench::new(config(), capacity());
    let sampling = SamplingParams {
        seed: 7,
        ..SamplingParams::default()
    };
    bench.add(GenerationRequest {
        n: 3,
        sampling: Arc::new(sampling),
        ..request(1, 6, 2)
    });
    assert_eq!(bench.scheduler.stats().waiting, 3);
    assert_eq!(bench.plan(), ["s0 0..6 bind *"]);
    bench.commit(&[Some(1)]);
    let batch = bench.plan_batch(Lane::Main).unwrap();
    // Each goes on in its own copy of the half-filled second block; the first block is shared.
    let tables: Vec<_> = batch
        .rows
        .iter()
        .map(|row| Arc::clone(&row.blocks))
        .collect();
    assert!(
        tables
            .iter()
            .all(|table| table[0] == tables[0][0] && table.len() == 2)
    );
    assert_eq!(batch.copies.len(), 3);
    for (copy, table) in batch.copies.iter().zip(&tables) {
        assert_eq!((copy.src, copy.dst), (batch.copies[0].src, table[1]));
    }
    let starts: Vec<u32> = batch.rows.iter().map(|row| row.start).collect();
    assert_eq!(
        starts,
        [6, 5, 5],
        "the prompt's last token is computed again"
    );
    let seeds: Vec<_> = batch
        .rows
        .iter()
        .filter_map(|r| Some(r.bind.as_ref()?.seed))
        .collect();
    assert_eq!(seeds, [8, 9]);
    bench.commit(&[Some(1), Some(2), Some(3)]);
    assert_eq!(
        bench.scheduler.stats().blocks_used,
        3,
        "the copied block is free"
    );
    assert_eq!(bench.plan(), ["s1 6..7 last *", "s2 6..7 last *"]);
    bench.commit(&[Some(2), Some(3)]);
    let usage = Usage {
        prompt_tokens: 6,
        cached_tokens: 0,
        completion_tokens: 6,
    };
    assert_eq!(bench.usage(1), Some(usage));
    assert!(bench.scheduler.is_idle());
}

/// Found by the simulation: sequence 0 loses its blocks before its first token comes back, and is
/// recomputed in chunks on the prefill lane. Its siblings must not copy what it still writes.
#[test]
fn siblings_fork_when_a_recomputation_is_over() {
    let lanes = vec![Lane::Main, Lane::Prefill];
    let small = Capacity {
        blocks: 6,
        lanes,
        depth: 2,
        ..capacity()
    };
    let mut bench = Bench::new(
        SchedulerConfig {
            prefix_caching: false,
            ..config()
        },
        small,
    );
    bench.add(request(1, 7, 10));
    assert_eq!(bench.plan(), ["s0 0..7 bind *"]);
    bench.commit(&[Some(1)]);
    bench.add(GenerationRequest {
        n: 2,
        ..request(2, 8, 2)
    });
    assert_eq!(bench.plan(), ["s0 7..8 last *"]);
    assert_eq!(bench.plan_on(Lane::Prefill), ["s1 0..8 bind *"]);
    bench.commit(&[Some(1)]);
    for _ in 8..11 {
        bench.plan();
        bench.commit(&[Some(1)]);
    }
    bench.add(GenerationRequest {
        priority: -1,
        ..request(3, 1, 4)
    });
    assert_eq!(bench.plan(), ["s0 11..12 last *", "s2 0..1 bind *"]);
    bench.commit(&[Some(1), Some(3)]);
    // The first request needs a block.
    assert_eq!(bench.plan(), ["s2 1..2 last *"]);
    assert_eq!(bench.scheduler.stats().preemptions, 1);
    bench.commit(&[Some(3)]);
    bench.commit_on(Lane::Prefill, &[Some(2)]);
    bench
        .scheduler
        .finish(RequestId(1), None, FinishReason::Abort, bench.now);
    assert_eq!(bench.plan(), ["s2 2..3 last *"]);
    assert_eq!(bench.plan_on(Lane::Prefill), ["s1 0..8"]);
    bench.commit_on(Lane::Prefill, &[None]);
    assert_eq!(bench.plan_on(Lane::Prefill), ["s1 8..9 last *"]);
    assert_eq!(bench.plan(), ["s2 3..4 last *"], "the sibling waits");
    bench.commit_on(Lane::Prefill, &[Some(2)]);
    bench.commit(&[Some(3)]);
    assert_eq!(bench.plan(), ["s3 7..8 bind *"]);
}

#[test]
fn siblings_line_up_when_there_is_nothing_to_fork_from() {
    let mut bench = Bench::new(config(), capacity());
    bench.add(GenerationRequest {
        n: 3,
        ..request(1, 12, 2)
    });
    assert_eq!(bench.plan(), ["s0 0..8 bind"]);
    bench
        .scheduler
        .finish(RequestId(1), Some(1), FinishReason::Abort, 0);
    bench
        .scheduler
        .finish(RequestId(1), Some(0), FinishReason::Abort, 0);
    bench.commit(&[None]);
    assert_eq!(
        bench.plan(),
        ["s1 0..8 bind"],
        "its blocks were never committed"
    );
    bench.commit(&[None]);
    assert_eq!(bench.plan(), ["s1 8..12 *"]);
    bench.commit(&[Some(EOS)]);
    let ends = [
        (1, FinishReason::Abort),
        (0, FinishReason::Abort),
        (2, FinishReason::Stop(None)),
    ];
    assert_eq!(
        bench.finished(),
        ends.map(|(index, reason)| (1, index, reason))
    );
}
