//! How sequences end, and what is refused.

use std::sync::Arc;

use spate_executor::{Capacity, Lane, RowOutput};
use spate_scheduler::{AddError, Event, Scheduler, SchedulerConfig};
use spate_types::{
    FinishReason, GenerationRequest, RequestId, SampledToken, SamplingParams, SeqId, StopParams,
};

use crate::bench::{Bench, capacity, config, request};

#[test]
fn the_context_length_ends_a_sequence() {
    let mut bench = Bench::new(
        SchedulerConfig {
            max_model_len: 6,
            ..config()
        },
        capacity(),
    );
    bench.add(request(1, 4, 10));
    bench.plan();
    bench.commit(&[Some(1)]);
    assert_eq!(bench.plan(), ["s0 4..5 last *"]);
    bench.commit(&[Some(1)]);
    assert_eq!(bench.finished(), [(1, 0, FinishReason::Length)]);
}

#[test]
fn a_clients_stop_id_is_reported() {
    let mut bench = Bench::new(config(), capacity());
    bench.add(request(1, 4, 10));
    bench.plan();
    bench.commit(&[Some(98)]);
    let seq = SeqId {
        request: RequestId(1),
        index: 0,
    };
    let token = SampledToken {
        token: 98,
        logprobs: None,
    };
    assert_eq!(
        bench.events[..2],
        [
            Event::Token { seq, token },
            Event::Finished {
                seq,
                reason: FinishReason::Stop(Some(98))
            }
        ]
    );
}

#[test]
fn an_abort_frees_blocks_at_every_stage() {
    // Waiting; prompt in flight; between chunks; decode in flight; two steps in flight.
    for stage in 0..5 {
        let mut bench = Bench::new(
            config(),
            Capacity {
                depth: 2,
                ..capacity()
            },
        );
        bench.add(request(1, 12, 10));
        let mut in_flight = 0;
        match stage {
            0 => {}
            1 => {
                bench.plan();
                in_flight = 1;
            }
            2 => {
                bench.plan();
                bench.commit(&[None]);
            }
            _ => {
                bench.plan();
                bench.plan();
                bench.commit(&[None]);
                bench.commit(&[Some(1)]);
                for _ in 3..=stage {
                    assert_eq!(bench.plan().len(), 1);
                    in_flight += 1;
                }
            }
        }
        bench
            .scheduler
            .finish(RequestId(1), None, FinishReason::Abort, bench.now);
        assert!(bench.plan().is_empty(), "stage {stage}");
        assert_eq!(
            bench.finished(),
            [(1, 0, FinishReason::Abort)],
            "stage {stage}"
        );
        assert!(bench.usage(1).is_some(), "stage {stage}");
        for _ in 0..in_flight {
            assert!(
                bench.scheduler.stats().blocks_used > 0,
                "stage {stage}: pinned"
            );
            bench.commit(&[Some(1)]);
        }
        assert!(bench.scheduler.is_idle(), "stage {stage}");
        assert_eq!(bench.scheduler.stats().blocks_used, 0, "stage {stage}");
        let slots = usize::from(stage > 0);
        assert_eq!(
            bench.scheduler.take_released().len(),
            slots,
            "stage {stage}"
        );
    }
}

#[test]
fn a_deadline_ends_a_request_wherever_it_is() {
    let mut bench = Bench::new(
        SchedulerConfig {
            max_num_seqs: 1,
            ..config()
        },
        capacity(),
    );
    bench.add(GenerationRequest {
        deadline: Some(50),
        ..request(1, 4, 10)
    });
    bench.add(GenerationRequest {
        deadline: Some(40),
        n: 2,
        ..request(2, 4, 10)
    });
    bench.add(request(3, 4, 1));
    assert_eq!(bench.scheduler.next_deadline(), Some(40));
    assert_eq!(bench.plan(), ["s0 0..4 bind *"]);
    bench.now = 40;
    assert!(bench.plan().is_empty());
    let deadline = FinishReason::Deadline;
    assert_eq!(bench.finished(), [(2, 1, deadline), (2, 0, deadline)]);
    assert_eq!(bench.scheduler.next_deadline(), Some(50));
    bench.commit(&[Some(1)]);
    // It runs out with nothing in flight: the one seat is free at once, and so is the slot.
    assert_eq!(bench.plan(), ["s1 0..4 bind *"]);
    assert_eq!(bench.finished()[2..], [(1, 0, deadline)]);
    assert_eq!(bench.scheduler.next_deadline(), None);
}

#[test]
fn a_failed_row_ends_its_sequence_alone_and_is_not_cached() {
    let mut bench = Bench::new(config(), capacity());
    bench.add(request(1, 5, 2));
    bench.add(request(2, 3, 1));
    assert_eq!(bench.plan(), ["s0 0..5 bind *", "s1 0..3 bind *"]);
    let bad = RowOutput {
        failed: true,
        ..RowOutput::default()
    };
    let token = SampledToken {
        token: 1,
        logprobs: None,
    };
    let good = RowOutput {
        sampled: Some(token),
        ..RowOutput::default()
    };
    bench.commit_outputs(Lane::Main, vec![bad, good]);
    assert_eq!(
        bench.finished(),
        [(1, 0, FinishReason::Error), (2, 0, FinishReason::Length)]
    );
    assert_eq!(bench.scheduler.stats().blocks_cached, 0);
    assert!(bench.scheduler.is_idle());
}

#[test]
fn what_cannot_be_served_is_refused() {
    let add = |request| {
        Scheduler::new(config(), capacity())
            .add(request, 0)
            .unwrap_err()
    };
    assert_eq!(
        add(request(1, 64, 1)),
        AddError::PromptTooLong { len: 64, max: 63 }
    );
    let tight = Capacity {
        blocks: 4,
        ..capacity()
    };
    let error = Scheduler::new(config(), tight.clone())
        .add(request(1, 10, 8), 0)
        .unwrap_err();
    assert_eq!(
        error,
        AddError::NeedsMoreKv {
            need_tokens: 17,
            have_tokens: 16
        }
    );
    assert_eq!(
        Scheduler::new(config(), tight).add(request(1, 10, 7), 0),
        Ok(())
    );

    let good = || request(1, 4, 1);
    let sampling = |sampling| GenerationRequest {
        sampling: Arc::new(sampling),
        ..good()
    };
    let stop = |stop| GenerationRequest {
        stop: Arc::new(stop),
        ..good()
    };
    let stops = StopParams {
        max_tokens: 1,
        ..StopParams::default()
    };
    let plain = SamplingParams::default;
    let invalid = [
        request(1, 0, 1),
        request(1, 4, 0),
        GenerationRequest { n: 0, ..good() },
        GenerationRequest { n: 15, ..good() },
        GenerationRequest {
            n: u32::MAX,
            ..good()
        },
        GenerationRequest {
            prompt: Arc::new([0, 100]),
            ..good()
        },
        sampling(SamplingParams {
            logit_bias: vec![(100, 1.0)],
            ..plain()
        }),
        sampling(SamplingParams {
            min_tokens_banned: vec![100],
            ..plain()
        }),
        sampling(SamplingParams {
            logprobs: Some(101),
            ..plain()
        }),
        sampling(SamplingParams {
            prompt_logprobs: Some(101),
            ..plain()
        }),
        stop(StopParams {
            token_ids: vec![100],
            ..stops.clone()
        }),
        stop(StopParams {
            eos_ids: vec![u32::MAX],
            ..stops
        }),
    ];
    for request in invalid {
        assert!(
            matches!(add(request.clone()), AddError::Invalid(_)),
            "{request:?}"
        );
    }
}

#[test]
fn live_sequences_are_bounded() {
    let mut bench = Bench::new(
        SchedulerConfig {
            max_num_seqs: 1,
            max_waiting: 3,
            ..config()
        },
        capacity(),
    );
    bench.add(GenerationRequest {
        n: 3,
        ..request(1, 4, 1)
    });
    let two = GenerationRequest {
        n: 2,
        ..request(2, 4, 1)
    };
    assert_eq!(
        bench.scheduler.add(two.clone(), 0),
        Err(AddError::QueueFull)
    );
    bench.add(request(3, 4, 1));
    let again = bench.scheduler.add(request(3, 4, 1), 0);
    assert!(
        matches!(again, Err(AddError::Invalid(_))),
        "an id that is live"
    );
    bench
        .scheduler
        .finish(RequestId(1), None, FinishReason::Abort, 0);
    bench.add(two);
    // Ends of what is unknown are fine.
    bench
        .scheduler
        .finish(RequestId(1), None, FinishReason::Abort, 0);
    bench
        .scheduler
        .finish(RequestId(2), Some(u32::MAX), FinishReason::Abort, 0);
    bench.plan();
    assert_eq!(bench.finished().len(), 3);
}
