//! Replayed plan traces: the exact batches expected for small situations.
//!
//! A row is written `s1 4..7 *`: slot 1 computes positions 4 to 6 and samples. `last` means that its
//! input is the token sampled before; `bind` that it is the slot's first.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use spate_executor::{Batch, Capacity, Input, Lane, LocalKv, RowOutput};
use spate_scheduler::{AddError, Event, Scheduler, SchedulerConfig};
use spate_types::{
    FinishReason, GenerationRequest, RequestId, SampledToken, SamplingParams, SeqId, Slot,
    StopParams, TokenId, Usage,
};

const EOS: TokenId = 99;

fn capacity() -> Capacity {
    Capacity {
        slots: 8,
        blocks: 16,
        block_size: 4,
        local: None,
        max_batch_tokens: 8,
        step_tokens: None,
        max_seq_len: 64,
        vocab_size: 100,
        lanes: vec![Lane::Main],
        depth: 1,
    }
}

fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 4,
        max_batch_tokens: 8,
        max_model_len: 64,
        max_waiting: 10,
        prefix_caching: true,
    }
}

/// A request whose prompt is `prompt_len` tokens that no other id shares.
fn request(id: u64, prompt_len: u32, max_tokens: u32) -> GenerationRequest {
    GenerationRequest {
        id: RequestId(id),
        prompt: (0..prompt_len).map(|i| (i * 7 + id as u32) % 90).collect(),
        sampling: Arc::new(SamplingParams::default()),
        stop: Arc::new(StopParams {
            max_tokens,
            eos_ids: vec![EOS],
            token_ids: vec![98],
        }),
        n: 1,
        priority: 0,
        cache_salt: None,
        deadline: None,
    }
}

/// A scheduler, and an executor that samples whatever the test says.
struct Bench {
    scheduler: Scheduler,
    now: u64,
    events: Vec<Event>,
}

impl Bench {
    fn new(config: SchedulerConfig, capacity: Capacity) -> Self {
        Self {
            scheduler: Scheduler::new(config, capacity),
            now: 0,
            events: Vec::new(),
        }
    }

    fn add(&mut self, request: GenerationRequest) {
        self.scheduler.add(request, self.now).unwrap();
    }

    fn plan_batch(&mut self, lane: Lane) -> Option<Batch> {
        let batch = self.scheduler.plan(lane, self.now);
        self.scheduler.check_invariants();
        self.events.extend(self.scheduler.take_events());
        batch
    }

    fn plan(&mut self) -> Vec<String> {
        self.plan_on(Lane::Main)
    }

    fn plan_on(&mut self, lane: Lane) -> Vec<String> {
        let rows = self.plan_batch(lane).map_or(Vec::new(), |batch| batch.rows);
        rows.iter()
            .map(|row| {
                let bind = if row.bind.is_some() { " bind" } else { "" };
                let last = if row.input == Input::Last {
                    " last"
                } else {
                    ""
                };
                let sample = if row.sample { " *" } else { "" };
                format!(
                    "s{} {}..{}{bind}{last}{sample}",
                    row.slot.0,
                    row.start,
                    row.end()
                )
            })
            .collect()
    }

    /// Commits the oldest step; `None` is a row that samples nothing.
    fn commit(&mut self, tokens: &[Option<TokenId>]) {
        self.commit_on(Lane::Main, tokens);
    }

    fn commit_on(&mut self, lane: Lane, tokens: &[Option<TokenId>]) {
        let output = |token: &Option<TokenId>| RowOutput {
            sampled: token.map(|token| SampledToken {
                token,
                logprobs: None,
            }),
            ..RowOutput::default()
        };
        self.commit_outputs(lane, tokens.iter().map(output).collect());
    }

    fn commit_outputs(&mut self, lane: Lane, outputs: Vec<RowOutput>) {
        self.now += 10;
        self.scheduler.commit(lane, outputs, self.now);
        self.scheduler.check_invariants();
        self.events.extend(self.scheduler.take_events());
    }

    fn finished(&self) -> Vec<(u64, u32, FinishReason)> {
        let ends = self.events.iter().filter_map(|event| match event {
            Event::Finished { seq, reason } => Some((seq.request.0, seq.index, *reason)),
            _ => None,
        });
        ends.collect()
    }

    fn usage(&self, id: u64) -> Option<Usage> {
        self.events.iter().find_map(|event| match event {
            Event::Done { request, usage, .. } if request.0 == id => Some(*usage),
            _ => None,
        })
    }
}

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
