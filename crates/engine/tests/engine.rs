//! The engine over the simulated executor: what callers see, in health and in failure.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use spate_engine::{
    AdmitError, EngineConfig, EngineHandle, Event, Health, SchedulerConfig, SubmitError,
    TokenStream,
};
use spate_executor::{Capacity, Lane, SimConfig, SimExecutor};
use spate_types::{FinishReason, GenerationRequest, SamplingParams, StopParams, TokenId};

const MAX_LEN: u32 = 256;

fn sim() -> SimConfig {
    SimConfig::new(Capacity {
        slots: 8,
        blocks: 256,
        block_size: 4,
        local: None,
        max_batch_tokens: 64,
        step_tokens: None,
        max_seq_len: MAX_LEN,
        vocab_size: 1000,
        lanes: vec![Lane::Main],
        depth: 2,
    })
}

fn start(sim: &SimConfig) -> EngineHandle {
    let scheduler = SchedulerConfig {
        max_num_seqs: 8,
        max_batch_tokens: 64,
        max_model_len: MAX_LEN,
        max_waiting: 8,
        prefix_caching: true,
    };
    let config = EngineConfig {
        scheduler,
        step_timeout: Duration::from_millis(300),
    };
    spate_engine::start(Box::new(SimExecutor::new(sim.clone())), config, |_| {}).unwrap()
}

fn request(
    engine: &EngineHandle,
    prompt: &[TokenId],
    n: u32,
    max_tokens: u32,
) -> GenerationRequest {
    GenerationRequest {
        id: engine.next_id(),
        prompt: prompt.into(),
        sampling: Arc::new(SamplingParams {
            temperature: 1.0,
            seed: u64::from(prompt[0]),
            ..SamplingParams::default()
        }),
        stop: Arc::new(StopParams {
            max_tokens,
            ..StopParams::default()
        }),
        n,
        priority: 0,
        cache_salt: None,
        deadline: None,
    }
}

fn submit(engine: &EngineHandle, request: GenerationRequest) -> TokenStream {
    let permit = engine.admit(request.n).unwrap();
    engine.submit(permit, request).unwrap()
}

/// Tokens and finish reason of each sequence.
async fn collect(mut stream: TokenStream, n: u32) -> Vec<(Vec<TokenId>, FinishReason)> {
    let mut tokens = vec![Vec::new(); n as usize];
    let mut reasons = vec![None; n as usize];
    let mut done = 0;
    while let Some(events) = stream.next().await {
        assert!(!events.is_empty());
        for event in events {
            match event {
                Event::Token { seq, token } => tokens[seq.index as usize].push(token.token),
                Event::Finished { seq, reason } => {
                    assert_eq!(reasons[seq.index as usize].replace(reason), None);
                }
                Event::Done { .. } => done += 1,
                Event::PromptLogprobs { .. } => panic!("nobody asked for them"),
            }
        }
    }
    assert_eq!(done, 1);
    tokens
        .into_iter()
        .zip(reasons)
        .map(|(tokens, reason)| (tokens, reason.expect("every sequence ends")))
        .collect()
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen within 5 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_give_what_each_gives_alone() {
    let sim = sim();
    let engine = start(&sim);
    let prompts: Vec<Vec<TokenId>> = (0..12u32)
        .map(|i| {
            (0..20)
                .map(|p| if p < 12 { p } else { i * 31 + p })
                .collect()
        })
        .collect();
    let mut running = Vec::new();
    for prompt in &prompts {
        let request = request(&engine, prompt, 1, 30);
        let expected = SimExecutor::reference(&sim, &request, 0, MAX_LEN);
        running.push((expected, tokio::spawn(collect(submit(&engine, request), 1))));
    }
    for (expected, outcome) in running {
        assert_eq!(outcome.await.unwrap(), [expected]);
    }
    tokio::time::timeout(Duration::from_secs(5), engine.idle())
        .await
        .expect("nothing is left");
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.blocks_used), (0, 0, 0));
    assert!(stats.prefix_hit_tokens > 0, "the prompts begin alike");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parallel_sequences_differ_and_equal_their_references() {
    let sim = sim();
    let engine = start(&sim);
    let request = request(&engine, &[5, 6, 7, 8, 9, 10], 4, 20);
    let expected: Vec<_> = (0..4)
        .map(|i| SimExecutor::reference(&sim, &request, i, MAX_LEN))
        .collect();
    assert_eq!(collect(submit(&engine, request), 4).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_stream_frees_everything() {
    let mut sim = sim();
    sim.step_time = Duration::from_millis(2);
    let engine = start(&sim);
    let mut stream = submit(&engine, request(&engine, &[1, 2, 3], 2, 200));
    stream.next().await.unwrap();
    drop(stream);
    tokio::time::timeout(Duration::from_secs(5), engine.idle())
        .await
        .expect("an abandoned request ends");
    assert_eq!(engine.stats().blocks_used, 0);
    assert!(engine.stats().generation_tokens < 300, "it ended early");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_sequence_can_be_ended_from_outside() {
    let mut sim = sim();
    sim.step_time = Duration::from_millis(1);
    let engine = start(&sim);
    let mut stream = submit(&engine, request(&engine, &[1, 2, 3], 2, 60));
    stream.next().await.unwrap();
    stream.end(1, FinishReason::Stop(None));
    let ends = collect(stream, 2).await;
    assert_eq!(ends[0].1, FinishReason::Length);
    assert_eq!(ends[1].1, FinishReason::Stop(None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_a_request() {
    let mut sim = sim();
    sim.step_time = Duration::from_millis(5);
    let engine = start(&sim);
    let mut late = request(&engine, &[1, 2, 3], 1, 200);
    late.deadline = Some(engine.now() + 50_000);
    let ends = collect(submit(&engine, late), 1).await;
    assert_eq!(ends[0].1, FinishReason::Deadline);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_until_something_ends() {
    let mut sim = sim();
    sim.step_time = Duration::from_millis(1);
    let engine = start(&sim);
    let held = engine.admit(15).unwrap();
    let stream = submit(&engine, request(&engine, &[1, 2], 1, 20));
    let full = AdmitError::QueueFull {
        live: 16,
        limit: 16,
    };
    assert_eq!(engine.admit(1).err(), Some(full));
    assert!(engine.admit(u32::MAX).is_err());
    collect(stream, 1).await;
    assert!(engine.admit(1).is_ok(), "the finished request left");
    drop(held);
    assert!(engine.admit(16).is_ok(), "permits come back when dropped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_stopped_at_the_door() {
    let engine = start(&sim());
    let cases: [(&str, &[TokenId], u32); 3] = [
        ("empty", &[], 5),
        ("unknown id", &[1, 1000], 5),
        ("no output", &[1], 0),
    ];
    for (what, prompt, max_tokens) in cases {
        let mut bad = request(&engine, &[1], 1, max_tokens);
        bad.prompt = prompt.into();
        let refused = engine.submit(engine.admit(1).unwrap(), bad);
        assert!(matches!(refused, Err(SubmitError::Invalid(_))), "{what}");
    }
    let twice = request(&engine, &[1], 1, 200);
    let _running = submit(&engine, twice.clone());
    let refused = engine.submit(engine.admit(1).unwrap(), twice);
    assert!(matches!(refused, Err(SubmitError::Invalid(_))), "same id");
    assert_eq!(engine.health(), Health::Ok);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_row_fails_its_request_alone() {
    let mut sim = sim();
    sim.fail_token = Some(999);
    let engine = start(&sim);
    let poisoned = submit(&engine, request(&engine, &[7, 999, 8], 1, 5));
    let sound = request(&engine, &[7, 8, 9], 1, 5);
    let expected = SimExecutor::reference(&sim, &sound, 0, MAX_LEN);
    let sound = submit(&engine, sound);
    assert_eq!(collect(poisoned, 1).await[0].1, FinishReason::Error);
    assert_eq!(collect(sound, 1).await, [expected]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_device_ends_every_stream_and_turns_health_red() {
    let mut lost = sim();
    lost.fatal_after = Some(5);
    let mut hung = sim();
    hung.hang_after = Some(5);
    let mut stuck = sim();
    stuck.stuck_after = Some(5);
    for sim in [lost, hung, stuck] {
        let engine = start(&sim);
        let mut streams = vec![submit(&engine, request(&engine, &[1, 2, 3], 2, 100))];
        // The others may come too late.
        streams.extend((2..6).filter_map(|i| {
            let permit = engine.admit(2).ok()?;
            engine
                .submit(permit, request(&engine, &[i, 2, 3], 2, 100))
                .ok()
        }));
        for stream in streams {
            for (_, reason) in collect(stream, 2).await {
                assert_eq!(reason, FinishReason::Error);
            }
        }
        let reason = tokio::time::timeout(Duration::from_secs(5), engine.dead())
            .await
            .expect("death is announced");
        assert_eq!(engine.health(), Health::Dead(reason.clone()));
        assert_eq!(engine.admit(1).err(), Some(AdmitError::Dead(reason)));
        engine.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_finishes_what_runs_and_admits_no_more() {
    let mut sim = sim();
    sim.step_time = Duration::from_millis(1);
    let engine = start(&sim);
    let running = tokio::spawn(collect(
        submit(&engine, request(&engine, &[4, 5], 1, 50)),
        1,
    ));
    engine.begin_drain();
    assert_eq!(engine.admit(1).err(), Some(AdmitError::Draining));
    engine.idle().await;
    assert_eq!(running.await.unwrap()[0].1, FinishReason::Length);
    engine.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_aborts_what_runs() {
    let mut sim = sim();
    sim.step_time = Duration::from_millis(5);
    let engine = start(&sim);
    let mut stream = submit(&engine, request(&engine, &[4, 5], 1, 200));
    stream.next().await.unwrap();
    engine.shutdown();
    assert_eq!(collect(stream, 1).await[0].1, FinishReason::Abort);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_observer_sees_every_token_once() {
    let seen = Arc::new(Mutex::new((0u64, 0u32)));
    let counted = seen.clone();
    let config = EngineConfig {
        scheduler: SchedulerConfig {
            max_num_seqs: 8,
            max_batch_tokens: 64,
            max_model_len: MAX_LEN,
            max_waiting: 8,
            prefix_caching: true,
        },
        step_timeout: Duration::from_secs(5),
    };
    let executor = Box::new(SimExecutor::new(sim()));
    let engine = spate_engine::start(executor, config, move |report| {
        let mut seen = counted.lock().unwrap();
        for event in &report.events {
            seen.0 += u64::from(matches!(event, Event::Token { .. }));
        }
        seen.1 += report.batch_tokens;
    })
    .unwrap();
    let ends = collect(submit(&engine, request(&engine, &[4, 5, 6], 1, 33)), 1).await;
    assert_eq!(ends[0].0.len(), 33);
    eventually("the last report", || {
        // 3 prompt tokens and 32 decodes: the last token is never fed back.
        *seen.lock().unwrap() == (33, 35)
    })
    .await;
}
