//! A seeded simulation of the scheduler on the simulated executor, in virtual time: random requests,
//! priorities, deadlines, salts, aborts, pools so small that preemption is the rule, one or two
//! lanes, one to three steps in flight. After each step all invariants are checked; each request
//! must end exactly once, with the tokens that it gives alone.
//!
//! A failure names its seed; `SPATE_SIM_SEED=<seed> cargo test -p spate-scheduler --test simulation`
//! replays just that one.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Instant;

use spate_executor::{Capacity, Executor, Lane, LocalKv, SimConfig, SimExecutor};
use spate_scheduler::{AddError, Event, Scheduler, SchedulerConfig, Stats};
use spate_types::{
    FinishReason, GenerationRequest, RequestId, SamplingParams, SeqId, StopParams, TokenId, Usage,
};

/// Steps to simulate in CI.
const STEPS: u64 = 400_000;

#[test]
fn simulation() {
    if let Ok(seed) = std::env::var("SPATE_SIM_SEED") {
        Simulation::new(seed.parse().unwrap()).run();
        return;
    }
    let (mut steps, mut seed) = (0, 0);
    let mut seen = Stats::default();
    while steps < STEPS {
        let outcome = catch_unwind(AssertUnwindSafe(|| Simulation::new(seed).run()));
        let (stats, ran) = outcome.unwrap_or_else(|panic| {
            eprintln!("simulation failed; replay with SPATE_SIM_SEED={seed}");
            resume_unwind(panic)
        });
        seen.preemptions += stats.preemptions;
        seen.prefix_hit_tokens += stats.prefix_hit_tokens;
        seen.generation_tokens += stats.generation_tokens;
        seen.computed_tokens += stats.computed_tokens;
        steps += ran;
        seed += 1;
    }
    eprintln!("{seed} seeds, {steps} steps: {seen:?}");
    // The simulation is worth nothing if it does not get into trouble.
    assert!(
        seen.preemptions > 1000,
        "only {} preemptions",
        seen.preemptions
    );
    assert!(
        seen.prefix_hit_tokens > 10_000,
        "only {} hit tokens",
        seen.prefix_hit_tokens
    );
}

/// SplitMix64, as good as any here.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From `low` to `high`, both included.
    fn range(&mut self, low: u32, high: u32) -> u32 {
        low + (self.next() % u64::from(high - low + 1)) as u32
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.range(1, 100) <= percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.range(0, from.len() as u32 - 1) as usize]
    }
}

/// What a request must come to, and what came so far.
struct Expected {
    request: GenerationRequest,
    alone: Vec<(Vec<TokenId>, FinishReason)>,
    tokens: Vec<Vec<TokenId>>,
    finished: Vec<Option<FinishReason>>,
    prompt_logprobs: Vec<TokenId>,
    /// Sequences that were told to end early, with the reason given.
    ended: Vec<Option<FinishReason>>,
    done: Option<Usage>,
}

struct Simulation {
    rng: Rng,
    sim_config: SimConfig,
    config: SchedulerConfig,
    scheduler: Scheduler,
    executor: SimExecutor,
    now: u64,
    requests: BTreeMap<RequestId, Expected>,
    /// Lanes of the batches in flight, by ticket.
    in_flight: BTreeMap<u64, Lane>,
    steps: u64,
    /// Prompts begin with one of these.
    prefixes: Vec<Vec<TokenId>>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let block_size = rng.pick(&[1, 2, 4, 8]);
        let two_lanes = rng.chance(50);
        let max_batch_tokens = rng.pick(&[2, 4, 8, 24, 64]);
        let max_num_seqs = rng.range(1, 6);
        let local = rng.chance(50).then(|| {
            let window = rng.pick(&[1, 3, 7, 16, 40]);
            let least = LocalKv::least_blocks(window, block_size, max_batch_tokens);
            LocalKv {
                window,
                blocks: least + rng.range(0, least),
            }
        });
        let capacity = Capacity {
            slots: max_num_seqs + rng.range(0, 3),
            blocks: rng.range(24, 96).div_ceil(block_size),
            block_size,
            local,
            max_batch_tokens,
            step_tokens: rng.pick(&[None, Some(1), Some(3), Some(16)]),
            max_seq_len: 64,
            vocab_size: 40,
            lanes: if two_lanes {
                vec![Lane::Main, Lane::Prefill]
            } else {
                vec![Lane::Main]
            },
            depth: rng.range(1, 3),
        };
        let config = SchedulerConfig {
            max_num_seqs,
            max_batch_tokens,
            max_model_len: rng.pick(&[24, 48, 64, 100]),
            max_waiting: rng.range(2, 30),
            prefix_caching: rng.chance(80),
        };
        let mut sim_config = SimConfig::new(capacity.clone());
        sim_config.seed = seed;
        sim_config.fail_token = rng.chance(20).then_some(39);
        let prefixes = (0..3)
            .map(|_| (0..30).map(|_| rng.range(0, 38)).collect())
            .collect();
        Self {
            scheduler: Scheduler::new(config.clone(), capacity),
            executor: SimExecutor::new(sim_config.clone()),
            rng,
            sim_config,
            config,
            now: 1,
            requests: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            steps: 0,
            prefixes,
        }
    }

    fn run(mut self) -> (Stats, u64) {
        let arrivals = self.rng.range(10, 60);
        let mut left = arrivals;
        let pressure = self.rng.pick(&[5, 30, 80]);
        loop {
            self.now += u64::from(self.rng.range(0, 20));
            while left > 0 && self.rng.chance(pressure) {
                left -= 1;
                self.arrive(arrivals - left);
            }
            if self.rng.chance(4) {
                self.disturb();
            }
            let progressed = self.pass();
            self.scheduler.check_invariants();
            if !progressed && self.scheduler.is_idle() {
                if left == 0 {
                    break;
                }
                left -= 1;
                self.arrive(arrivals - left);
            } else if !progressed {
                panic!("stuck: requests are live, but nothing is planned or in flight");
            }
        }
        self.check_outcome();
        (self.scheduler.stats(), self.steps)
    }

    fn arrive(&mut self, number: u32) {
        let request = self.random_request(u64::from(number));
        let max_len = self
            .config
            .max_model_len
            .min(self.sim_config.capacity.max_seq_len);
        match self.scheduler.add(request.clone(), self.now) {
            Ok(()) => {}
            Err(AddError::QueueFull) => return,
            Err(AddError::PromptTooLong { max, .. }) => {
                assert!(request.prompt.len() > max);
                return;
            }
            Err(AddError::NeedsMoreKv {
                need_tokens,
                have_tokens,
            }) => {
                assert!(need_tokens > have_tokens);
                return;
            }
            Err(AddError::Invalid(what)) => {
                assert!(request.n > self.config.max_live(), "{what}");
                return;
            }
        }
        let n = request.n as usize;
        let alone = (0..request.n)
            .map(|i| SimExecutor::reference(&self.sim_config, &request, i, max_len))
            .collect();
        let expected = Expected {
            alone,
            tokens: vec![Vec::new(); n],
            finished: vec![None; n],
            prompt_logprobs: Vec::new(),
            ended: vec![None; n],
            done: None,
            request,
        };
        self.requests.insert(expected.request.id, expected);
    }

    fn random_request(&mut self, id: u64) -> GenerationRequest {
        let rng = &mut self.rng;
        let prefix = &self.prefixes[rng.range(0, 2) as usize];
        let mut prompt = prefix[..rng.range(0, 30) as usize].to_vec();
        prompt.extend((0..rng.range(1, 12)).map(|_| rng.next() as u32 % 39));
        if rng.chance(5) {
            prompt.push(39);
        }
        let long = rng.chance(50);
        let sampling = SamplingParams {
            temperature: rng.pick(&[0.0, 1.0]),
            seed: rng.next(),
            prompt_logprobs: rng.chance(15).then_some(1),
            logprobs: rng.chance(15).then_some(2),
            min_tokens: rng.range(0, 4),
            min_tokens_banned: vec![0, 1, 2],
            ..SamplingParams::default()
        };
        let stop = StopParams {
            max_tokens: rng.pick(&[1, 2, 8, 20, 1000]),
            eos_ids: if long { vec![] } else { vec![0, 1] },
            token_ids: if long { vec![] } else { vec![2] },
        };
        GenerationRequest {
            id: RequestId(id),
            prompt: prompt.into(),
            sampling: Arc::new(sampling),
            stop: Arc::new(stop),
            n: if rng.chance(70) { 1 } else { rng.range(2, 4) },
            priority: if rng.chance(70) {
                0
            } else {
                rng.range(0, 2) as i32 - 1
            },
            cache_salt: rng.pick(&[None, None, Some("a"), Some("b")]).map(Arc::from),
            deadline: rng
                .chance(10)
                .then(|| self.now + u64::from(rng.range(0, 400))),
        }
    }

    /// Ends a random request or sequence, which may have ended already.
    fn disturb(&mut self) {
        if self.requests.is_empty() {
            return;
        }
        let nth = self.rng.range(0, self.requests.len() as u32 - 1) as usize;
        let (&id, expected) = self.requests.iter_mut().nth(nth).unwrap();
        let index = self
            .rng
            .chance(50)
            .then(|| self.rng.range(0, expected.request.n));
        let reason = self
            .rng
            .pick(&[FinishReason::Abort, FinishReason::Stop(None)]);
        for (i, ended) in expected.ended.iter_mut().enumerate() {
            if expected.finished[i].is_none() && index.is_none_or(|index| index as usize == i) {
                *ended = Some(reason);
            }
        }
        self.scheduler.finish(id, index, reason, self.now);
        self.scheduler.check_invariants();
        self.take_events();
        let done = self.requests[&id].done.is_some();
        assert!(done || index.is_some(), "{id}: ended, but not done");
    }

    /// One turn of the engine's loop. Whether anything was planned or completed.
    fn pass(&mut self) -> bool {
        let mut lanes = self.sim_config.capacity.lanes.clone();
        if self.rng.chance(50) {
            lanes.reverse();
        }
        let mut progressed = false;
        for lane in lanes {
            if self.rng.chance(70) || self.in_flight.is_empty() {
                progressed |= self.plan(lane);
            }
        }
        // Sometimes the next step is planned before the last one is read back, sometimes not.
        if !self.in_flight.is_empty() && (!progressed || self.rng.chance(60)) {
            self.complete();
            progressed = true;
        }
        for slot in self.scheduler.take_released() {
            self.executor.release(slot);
        }
        progressed
    }

    fn plan(&mut self, lane: Lane) -> bool {
        let batch = self.scheduler.plan(lane, self.now);
        self.scheduler.check_invariants();
        // Deadlines may have passed.
        self.take_events();
        let Some(batch) = batch else {
            return false;
        };
        for row in &batch.rows {
            let end = u64::from(row.end());
            assert!(
                end < u64::from(self.config.max_model_len),
                "planned past the context"
            );
        }
        let ticket = self.executor.submit(lane, batch).unwrap();
        self.in_flight.insert(ticket.0, lane);
        self.steps += 1;
        true
    }

    fn complete(&mut self) {
        let completion = self.executor.wait(Instant::now()).unwrap().unwrap();
        let lane = self.in_flight.remove(&completion.ticket.0).unwrap();
        self.scheduler.commit(lane, completion.outputs, self.now);
        self.take_events();
    }

    fn take_events(&mut self) {
        for event in self.scheduler.take_events() {
            match event {
                Event::Token { seq, token } => {
                    let expected = self.live(seq);
                    let output = &mut expected.tokens[seq.index as usize];
                    output.push(token.token);
                    let alone = &expected.alone[seq.index as usize].0;
                    assert_eq!(output[..], alone[..output.len()], "{seq:?}: tokens differ");
                    let asked = expected.request.sampling.logprobs.is_some();
                    assert_eq!(token.logprobs.is_some(), asked);
                }
                Event::PromptLogprobs { request, logprobs } => {
                    let expected = self.requests.get_mut(&request).unwrap();
                    assert_eq!(expected.done, None);
                    expected
                        .prompt_logprobs
                        .extend(logprobs.iter().map(|l| l.token));
                }
                Event::Finished { seq, reason } => {
                    self.live(seq).finished[seq.index as usize] = Some(reason);
                }
                Event::Done {
                    request,
                    usage,
                    timings,
                } => {
                    let now = self.now;
                    let expected = self.requests.get_mut(&request).unwrap();
                    assert!(
                        expected.finished.iter().all(Option::is_some),
                        "done too early"
                    );
                    assert_eq!(expected.done.replace(usage), None, "done twice");
                    assert!(timings.arrived <= timings.finished && timings.finished <= now);
                }
            }
        }
    }

    /// The request of a sequence that something happens to, which must not have ended.
    fn live(&mut self, seq: SeqId) -> &mut Expected {
        let expected = self.requests.get_mut(&seq.request).unwrap();
        assert_eq!(
            expected.finished[seq.index as usize], None,
            "{seq:?} ended before"
        );
        expected
    }

    fn check_outcome(&self) {
        let stats = self.scheduler.stats();
        assert_eq!((stats.blocks_used, stats.running, stats.waiting), (0, 0, 0));
        let mut generated = 0;
        for (id, expected) in &self.requests {
            let usage = expected.done.unwrap_or_else(|| panic!("{id} did not end"));
            let completion: usize = expected.tokens.iter().map(Vec::len).sum();
            generated += completion as u64;
            assert_eq!(usage.completion_tokens as usize, completion, "{id}");
            assert_eq!(
                usage.prompt_tokens as usize,
                expected.request.prompt.len(),
                "{id}"
            );
            assert!(usage.cached_tokens < usage.prompt_tokens, "{id}");
            for (i, alone) in expected.alone.iter().enumerate() {
                let reason = expected.finished[i].unwrap();
                if reason == FinishReason::Deadline {
                    assert!(expected.request.deadline.is_some(), "{id}");
                } else if expected.ended[i].is_some() {
                    assert_eq!(Some(reason), expected.ended[i], "{id}");
                } else {
                    assert_eq!(
                        (&expected.tokens[i], reason),
                        (&alone.0, alone.1),
                        "{id} {i}"
                    );
                }
            }
            self.check_prompt_logprobs(*id, expected);
        }
        assert_eq!(stats.generation_tokens, generated);
    }

    fn check_prompt_logprobs(&self, id: RequestId, expected: &Expected) {
        let got = &expected.prompt_logprobs;
        if expected.request.sampling.prompt_logprobs.is_none() {
            assert!(
                got.is_empty(),
                "{id}: prompt logprobs that nobody asked for"
            );
            return;
        }
        let prompt = &expected.request.prompt[1..];
        assert_eq!(
            got[..],
            prompt[..got.len()],
            "{id}: prompt logprobs out of order"
        );
        if expected.tokens.iter().any(|tokens| !tokens.is_empty()) {
            assert_eq!(got.len(), prompt.len(), "{id}: prompt logprobs are missing");
        }
    }
}
