//! The simulator against the contract, and against misuse.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use spate_executor::{
    Batch, Bind, Capacity, Executor, ExecutorError, Input, Lane, LocalKv, Row, SimConfig,
    SimExecutor, conformance,
};
use spate_types::{BlockId, LocalBlocks, SamplingParams, Slot, TokenId};

fn config(block_size: u32, depth: u32, lanes: &[Lane]) -> SimConfig {
    SimConfig::new(Capacity {
        slots: 4,
        blocks: 300 / block_size,
        block_size,
        local: None,
        max_batch_tokens: 100,
        step_tokens: None,
        max_seq_len: 128,
        vocab_size: 50,
        lanes: lanes.to_vec(),
        depth,
    })
}

fn row(slot: u32, blocks: &[u32], start: u32, tokens: &[TokenId]) -> Row {
    let bind = Bind {
        prompt: tokens.into(),
        sampling: Arc::new(SamplingParams::default()),
        seed: 0,
    };
    Row {
        slot: Slot(slot),
        bind: Some(bind),
        start,
        input: Input::Tokens(tokens.to_vec()),
        blocks: Arc::new(blocks.iter().map(|&b| BlockId(b)).collect()),
        local: LocalBlocks::default(),
        sample: true,
        masked: false,
        prompt_logprobs: false,
    }
}

fn batch(rows: Vec<Row>) -> Batch {
    Batch {
        rows,
        ..Batch::default()
    }
}

#[test]
fn conforms() {
    for block_size in [4, 16] {
        for depth in 1..=3 {
            for lanes in [&[Lane::Main][..], &[Lane::Main, Lane::Prefill]] {
                let mut config = config(block_size, depth, lanes);
                conformance::run(&mut || Box::new(SimExecutor::new(config.clone())));
                config.capacity.local = Some(LocalKv {
                    window: 11,
                    blocks: 200 / block_size,
                });
                conformance::run(&mut || Box::new(SimExecutor::new(config.clone())));
            }
        }
    }
}

#[test]
fn reading_what_was_never_written_is_fatal() {
    let mut sim = SimExecutor::new(config(4, 1, &[Lane::Main]));
    sim.submit(Lane::Main, batch(vec![row(0, &[0, 1], 4, &[1, 2])]))
        .unwrap();
    let error = sim.wait(Instant::now()).unwrap_err();
    assert_eq!(
        error,
        ExecutorError::Fatal("slot 0 reads position 0: not written".into())
    );
}

#[test]
fn a_row_must_not_write_what_another_reads() {
    let mut sim = SimExecutor::new(config(4, 2, &[Lane::Main, Lane::Prefill]));
    let reader = row(0, &[0, 1], 4, &[1, 2]);
    let writer = row(1, &[0], 0, &[1, 2]);
    let together = sim.submit(Lane::Main, batch(vec![reader.clone(), writer.clone()]));
    assert!(matches!(together, Err(ExecutorError::Rejected(what)) if what.contains("block 0")));
    sim.submit(Lane::Main, batch(vec![reader])).unwrap();
    let beside = sim.submit(Lane::Prefill, batch(vec![writer.clone()]));
    assert!(matches!(beside, Err(ExecutorError::Rejected(what)) if what.contains("other lane")));
    // Behind it, on the same lane, is fine.
    sim.submit(Lane::Main, batch(vec![writer])).unwrap();
}

#[test]
fn a_sequence_is_in_one_lane() {
    let mut sim = SimExecutor::new(config(4, 2, &[Lane::Main, Lane::Prefill]));
    sim.submit(Lane::Prefill, batch(vec![row(0, &[0], 0, &[1])]))
        .unwrap();
    let result = sim.submit(Lane::Main, batch(vec![row(0, &[1], 0, &[1])]));
    assert!(matches!(result, Err(ExecutorError::Rejected(what)) if what.contains("another lane")));
}

#[test]
fn releasing_a_slot_in_flight_is_fatal() {
    let mut sim = SimExecutor::new(config(4, 1, &[Lane::Main]));
    sim.submit(Lane::Main, batch(vec![row(0, &[0], 0, &[1])]))
        .unwrap();
    sim.release(Slot(0));
    assert!(matches!(
        sim.wait(Instant::now()),
        Err(ExecutorError::Fatal(_))
    ));
}

#[test]
fn faults_are_injected() {
    let mut config = config(4, 1, &[Lane::Main]);
    config.fail_token = Some(7);
    config.fatal_after = Some(1);
    let mut sim = SimExecutor::new(config.clone());
    let rows = vec![row(0, &[0], 0, &[1, 7]), row(1, &[1], 0, &[1, 6])];
    sim.submit(Lane::Main, batch(rows)).unwrap();
    let outputs = sim.wait(Instant::now()).unwrap().unwrap().outputs;
    assert!(outputs[0].failed && outputs[0].sampled.is_none());
    assert!(!outputs[1].failed && outputs[1].sampled.is_some());
    assert!(matches!(
        sim.wait(Instant::now()),
        Err(ExecutorError::Fatal(_))
    ));

    config.fatal_after = None;
    config.hang_after = Some(0);
    let mut sim = SimExecutor::new(config);
    sim.submit(Lane::Main, batch(vec![row(0, &[0], 0, &[1])]))
        .unwrap();
    let deadline = Instant::now() + Duration::from_millis(5);
    assert!(sim.wait(deadline).unwrap().is_none());
    assert!(Instant::now() >= deadline);
}

#[test]
fn a_step_takes_its_time() {
    let mut config = config(4, 2, &[Lane::Main]);
    config.step_time = Duration::from_millis(10);
    let mut sim = SimExecutor::new(config);
    let began = Instant::now();
    sim.submit(Lane::Main, batch(vec![row(0, &[0], 0, &[1])]))
        .unwrap();
    sim.submit(Lane::Main, batch(vec![row(1, &[1], 0, &[1])]))
        .unwrap();
    assert!(sim.wait(began).unwrap().is_none());
    let later = began + Duration::from_secs(5);
    assert!(sim.wait(later).unwrap().is_some() && sim.wait(later).unwrap().is_some());
    assert!(
        began.elapsed() >= Duration::from_millis(20),
        "steps of a lane run one by one"
    );
}
