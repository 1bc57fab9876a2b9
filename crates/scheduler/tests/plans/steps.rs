//! Which rows a step has, and in what order.

use std::sync::Arc;

use spate_executor::{Capacity, Lane};
use spate_scheduler::SchedulerConfig;
use spate_types::{FinishReason, GenerationRequest, Slot};

use crate::bench::{Bench, EOS, capacity, config, request};

#[test]
fn decodes_go_first_and_prompts_fill_the_budget() {
    let mut bench = Bench::new(config(), capacity());
    bench.add(request(1, 5, 10));
    bench.add(request(2, 10, 10));
    bench.add(request(3, 3, 10));
    assert_eq!(bench.plan(), ["s0 0..5 bind *", "s1 0..3 bind"]);
    bench.commit(&[Some(1), None]);
    assert_eq!(bench.plan(), ["s0 5..6 last *", "s1 3..10 *"]);
    bench.commit(&[Some(1), Some(1)]);
    assert_eq!(
        bench.plan(),
        ["s0 6..7 last *", "s1 10..11 last *", "s2 0..3 bind *"]
    );
    bench.commit(&[Some(1), Some(1), Some(1)]);
    assert_eq!(
        bench.plan(),
        ["s0 7..8 last *", "s1 11..12 last *", "s2 3..4 last *"]
    );
}

#[test]
fn prompts_beside_decodes_are_paced() {
    let capacity = Capacity {
        blocks: 40,
        max_batch_tokens: 64,
        step_tokens: Some(4),
        ..capacity()
    };
    let config = SchedulerConfig {
        max_batch_tokens: 20,
        ..config()
    };
    let mut bench = Bench::new(config, capacity);
    bench.add(request(1, 24, 20));
    assert_eq!(bench.plan(), ["s0 0..20 bind"], "the limit that was set");
    bench.commit(&[None]);
    bench.add(request(2, 30, 20));
    assert_eq!(
        bench.plan(),
        ["s0 20..24 *", "s1 0..16 bind"],
        "nothing decodes"
    );
    bench.commit(&[Some(1), None]);
    bench.add(request(3, 12, 20));
    assert_eq!(bench.plan(), ["s0 24..25 last *", "s1 16..23"]);
    bench.commit(&[Some(1), None]);
    assert_eq!(
        bench.plan(),
        ["s0 25..26 last *", "s1 23..30 *"],
        "the first prompt is finished before the next begins"
    );
    bench.commit(&[Some(1), Some(1)]);
    assert_eq!(
        bench.plan(),
        ["s0 26..27 last *", "s1 30..31 last *", "s2 0..6 bind"],
        "two decodes have room for more beside them"
    );
}

#[test]
fn the_next_step_is_planned_before_the_last_came_back() {
    let mut bench = Bench::new(
        config(),
        Capacity {
            depth: 3,
            ..capacity()
        },
    );
    bench.add(request(1, 4, 3));
    bench.add(request(2, 2, 2));
    assert_eq!(bench.plan(), ["s0 0..4 bind *", "s1 0..2 bind *"]);
    assert_eq!(bench.plan(), ["s0 4..5 last *", "s1 2..3 last *"]);
    // The second is known to end by count.
    assert_eq!(bench.plan(), ["s0 5..6 last *"]);
    assert!(bench.plan().is_empty(), "the depth is reached");
    bench.commit(&[Some(1), Some(1)]);
    assert!(bench.plan().is_empty(), "both are known to end by count");
    // The first ends with the token that came back; its last row is thrown away.
    bench.commit(&[Some(EOS), Some(1)]);
    let ends = [
        (1, 0, FinishReason::Stop(None)),
        (2, 0, FinishReason::Length),
    ];
    assert_eq!(bench.finished(), ends);
    assert_eq!(
        bench.scheduler.take_released(),
        [Slot(1)],
        "slot 0 is still named"
    );
    assert!(
        bench.scheduler.stats().blocks_used > 0,
        "its blocks are too"
    );
    bench.commit(&[Some(7)]);
    assert_eq!(bench.scheduler.take_released(), [Slot(0)]);
    assert!(bench.scheduler.is_idle());
    assert_eq!(bench.usage(1).unwrap().completion_tokens, 2);
}

#[test]
fn a_big_head_of_line_is_not_overtaken_and_does_not_starve() {
    let mut bench = Bench::new(
        config(),
        Capacity {
            blocks: 6,
            ..capacity()
        },
    );
    bench.add(request(1, 8, 4));
    assert_eq!(bench.plan(), ["s0 0..8 bind *"]);
    bench.commit(&[Some(1)]);
    bench.add(request(2, 16, 4)); // needs 4 blocks and one in reserve
    bench.add(request(3, 2, 4));
    assert_eq!(
        bench.plan(),
        ["s0 8..9 last *"],
        "3 fits, but 2 is before it"
    );
    bench.commit(&[Some(1)]);
    bench.add(GenerationRequest {
        priority: -1,
        ..request(4, 2, 1)
    });
    assert_eq!(
        bench.plan(),
        ["s0 9..10 last *", "s1 0..2 bind *"],
        "4 has a better priority"
    );
    bench.commit(&[Some(1), Some(1)]);
    bench.plan();
    bench.commit(&[Some(1)]);
    assert_eq!(bench.plan(), ["s2 0..8 bind"]);
    bench.commit(&[None]);
    assert_eq!(bench.plan(), ["s2 8..16 *"]);
}

#[test]
fn a_cached_prefix_is_not_computed_again() {
    let mut bench = Bench::new(config(), capacity());
    let salted = |id, salt: Option<&str>| GenerationRequest {
        prompt: (0..9).collect(),
        cache_salt: salt.map(Arc::from),
        ..request(id, 9, 1)
    };
    let mut cached = |id, salt| {
        bench.add(salted(id, salt));
        let mut rows = Vec::new();
        while bench.usage(id).is_none() {
            let planned = bench.plan();
            bench.commit(&[planned[0].ends_with('*').then_some(1)]);
            rows.extend(planned);
            bench.scheduler.take_released();
        }
        (bench.usage(id).unwrap().cached_tokens, rows)
    };
    let whole = vec!["s0 0..8 bind".to_string(), "s0 8..9 *".to_string()];
    assert_eq!(cached(1, None), (0, whole.clone()));
    assert_eq!(cached(2, None), (8, vec!["s0 8..9 bind *".to_string()]));
    assert_eq!(cached(3, Some("tenant")), (0, whole));
    assert_eq!(cached(4, Some("tenant")).0, 8);
    let stats = bench.scheduler.stats();
    assert_eq!(
        (stats.prefix_queries_tokens, stats.prefix_hit_tokens),
        (36, 16)
    );
    assert_eq!((stats.prompt_tokens, stats.cached_prompt_tokens), (36, 16));
}

#[test]
fn a_long_prompt_runs_beside_decodes() {
    let lanes = vec![Lane::Main, Lane::Prefill];
    let mut bench = Bench::new(
        config(),
        Capacity {
            lanes,
            depth: 2,
            ..capacity()
        },
    );
    bench.add(request(1, 6, 20));
    assert!(
        bench.plan_on(Lane::Prefill).is_empty(),
        "nothing decodes: all of the device"
    );
    assert_eq!(bench.plan(), ["s0 0..6 bind *"]);
    bench.commit(&[Some(1)]);
    bench.add(request(2, 12, 20));
    bench.add(request(3, 2, 20));
    assert_eq!(
        bench.plan(),
        ["s0 6..7 last *", "s2 0..2 bind *"],
        "a short one joins them"
    );
    assert_eq!(bench.plan_on(Lane::Prefill), ["s1 0..8 bind"]);
    assert_eq!(bench.plan_on(Lane::Prefill), ["s1 8..12 *"]);
    assert_eq!(bench.plan(), ["s0 7..8 last *", "s2 2..3 last *"]);
    bench.commit_on(Lane::Prefill, &[None]);
    assert!(bench.plan_on(Lane::Prefill).is_empty());
    bench.commit(&[Some(1), Some(1)]);
    bench.commit_on(Lane::Prefill, &[Some(1)]);
    assert_eq!(
        bench.plan(),
        ["s0 8..9 last *", "s1 12..13 last *", "s2 3..4 last *"]
    );
}
