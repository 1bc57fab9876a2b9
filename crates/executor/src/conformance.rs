//! What every [`Executor`] must do, as checks that any implementation's tests can run.
//!
//! Outputs are compared exactly, log-probabilities included: a sequence's numbers must not depend
//! on its neighbours, its chunks or its blocks, not even in the last bit. The checks cost about 600
//! input tokens.

mod refusals;

use std::sync::Arc;
use std::time::{Duration, Instant};

use spate_types::{
    BlockId, BlockIds, LocalBlocks, Logprobs, SampledToken, SamplingParams, Slot, TokenId,
};

use crate::{
    Batch, Bind, BlockCopy, Capacity, Executor, ExecutorError, Input, Lane, Row, RowOutput, Ticket,
    TokenMask,
};

/// Longest sequence used: prompt and output.
const MAX_LEN: u32 = 48;
/// Output tokens that are compared.
const OUTPUT: usize = 5;
/// Far beyond what any step takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// How near generated tokens that are computed again, as a prompt's, must come to the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// The same bits.
    Exact,
    /// What another order of sums leaves: for executors that add up a token's attention in another order when
    /// it is generated than when it is a prompt's.
    Rounded,
}

/// Log-probabilities of a small model that differ by rounding alone are within it.
const ROUNDING: f32 = 0.1;

/// Runs all checks, on as few executors as possible: making one may load a model.
///
/// # Panics
/// With a message that names the broken promise; and if the capacity is too small to test with.
pub fn run(make: &mut dyn FnMut() -> Box<dyn Executor>) {
    run_with(Recompute::Exact, make);
}

/// The same, for executors that may promise less of what is computed again.
///
/// # Panics
/// As [`run`].
pub fn run_with(recompute: Recompute, make: &mut dyn FnMut() -> Box<dyn Executor>) {
    let mut rig = Rig::new(make());
    rig.completes_in_order();
    rig.refuses_bad_batches();
    let expected: Vec<Vec<SampledToken>> = (0..3)
        .map(|which| rig.alone(&rig.job(which, 0, 0)))
        .collect();
    rig.ignores_neighbours(&expected);
    rig.ignores_chunking(&expected);
    rig.ignores_placement(&expected);
    rig.reads_what_others_computed(&expected);
    rig.copies_before_rows(&expected);
    rig.takes_last_for_the_sampled_token(&expected);
    rig.recomputes_after_preemption(&expected, recompute);
    rig.forgets_at_bind_and_release(&expected);
    rig.draws_by_seed(&expected);
    rig.chooses_what_masks_allow(&expected);
    rig.reports_prompt_logprobs();
    if rig.capacity.lanes.contains(&Lane::Prefill) {
        rig.hands_over_between_lanes(&expected);
    }
    // A second executor: nothing may depend on what this one went through.
    let mut fresh = Rig::new(make());
    let job = fresh.job(0, 0, 0);
    assert_eq!(
        fresh.alone(&job),
        expected[0],
        "a fresh executor gives other outputs"
    );
}

/// A sequence to run: what, in which slot, in which blocks.
#[derive(Clone)]
struct Job {
    bind: Bind,
    slot: Slot,
    /// In both pools, if there are two.
    blocks: BlockIds,
    two_pools: bool,
}

impl Job {
    fn local(&self) -> LocalBlocks {
        let blocks = self.two_pools.then(|| Arc::clone(&self.blocks));
        LocalBlocks {
            first: 0,
            blocks: blocks.unwrap_or_default(),
        }
    }

    fn prompt_len(&self) -> u32 {
        self.bind.prompt.len() as u32
    }

    /// Computes prompt positions `start .. end`; samples if that is all of it.
    fn prompt_row(&self, start: u32, end: u32, bind: bool) -> Row {
        Row {
            slot: self.slot,
            bind: bind.then(|| self.bind.clone()),
            start,
            input: Input::Tokens(self.bind.prompt[start as usize..end as usize].to_vec()),
            blocks: Arc::clone(&self.blocks),
            local: self.local(),
            sample: end == self.prompt_len(),
            masked: false,
            prompt_logprobs: false,
        }
    }

    /// Computes the output token at `position` to get the next.
    fn decode_row(&self, position: u32, input: Input) -> Row {
        Row {
            start: position,
            input,
            sample: true,
            ..self.prompt_row(0, 1, false)
        }
    }
}

struct Rig {
    executor: Box<dyn Executor>,
    capacity: Capacity,
    /// Blocks of one sequence.
    width: u32,
}

impl Rig {
    fn new(executor: Box<dyn Executor>) -> Self {
        let capacity = executor.capacity().clone();
        let width = MAX_LEN.div_ceil(capacity.block_size);
        assert!(
            capacity.slots >= 3
                && capacity.blocks >= 3 * width
                && capacity.local.is_none_or(|local| local.blocks >= 3 * width)
                && capacity.max_batch_tokens >= 2 * MAX_LEN
                && capacity.max_seq_len >= MAX_LEN
                && capacity.lanes.contains(&Lane::Main),
            "conformance needs 3 slots, {} blocks, {} batch tokens, sequences of {MAX_LEN} and the \
             main lane; it got {capacity:?}",
            3 * width,
            2 * MAX_LEN,
        );
        Self {
            executor,
            capacity,
            width,
        }
    }

    /// One of three jobs: 0 uses every sampling parameter, 1 is greedy, 2 is drawn from a seed. Its
    /// blocks are one of three areas of the pool.
    fn job(&self, which: u64, slot: u32, area: u32) -> Job {
        let plain = SamplingParams {
            logprobs: Some(3),
            ..SamplingParams::default()
        };
        let (length, sampling) = match which {
            0 => {
                let shaped = SamplingParams {
                    temperature: 0.8,
                    top_k: 40,
                    top_p: 0.95,
                    min_p: 0.01,
                    repetition_penalty: 1.3,
                    presence_penalty: 0.5,
                    frequency_penalty: 0.25,
                    logit_bias: vec![(1, 2.0)],
                    min_tokens: 3,
                    min_tokens_banned: vec![2],
                    ..plain
                };
                (37, shaped)
            }
            1 => (23, plain),
            _ => (
                9,
                SamplingParams {
                    temperature: 1.0,
                    ..plain
                },
            ),
        };
        let vocab = u64::from(self.capacity.vocab_size);
        // Any well-spread ids will do (Knuth's multiplicative hashing).
        let id = |i: u64| ((which * 97 + i + 1).wrapping_mul(2_654_435_761) % vocab) as TokenId;
        let first = area * self.width;
        Job {
            bind: Bind {
                prompt: (0..length).map(id).collect(),
                sampling: Arc::new(sampling),
                seed: 11 + which,
            },
            slot: Slot(slot),
            blocks: Arc::new((first..first + self.width).map(BlockId).collect()),
            two_pools: self.capacity.local.is_some(),
        }
    }

    fn submit(&mut self, lane: Lane, batch: Batch) -> Ticket {
        self.executor
            .submit(lane, batch)
            .expect("a sound batch is accepted")
    }

    fn wait(&mut self, ticket: Ticket, rows: usize) -> Vec<RowOutput> {
        let deadline = Instant::now() + PATIENCE;
        let completion = self.executor.wait(deadline).expect("the executor works");
        let completion = completion.expect("a step completes in time");
        assert_eq!(
            completion.ticket, ticket,
            "steps complete in order of submission"
        );
        assert_eq!(completion.outputs.len(), rows, "one output per row");
        completion.outputs
    }

    fn step_on(&mut self, lane: Lane, batch: Batch) -> Vec<RowOutput> {
        let rows = batch.rows.len();
        let ticket = self.submit(lane, batch);
        self.wait(ticket, rows)
    }

    fn step(&mut self, rows: Vec<Row>) -> Vec<RowOutput> {
        self.step_on(
            Lane::Main,
            Batch {
                rows,
                ..Batch::default()
            },
        )
    }

    /// Appends decoded tokens to `output`, whose first came with the prompt's last row, until it
    /// has `OUTPUT`.
    fn decode(&mut self, job: &Job, output: &mut Vec<SampledToken>) {
        while output.len() < OUTPUT {
            let position = job.prompt_len() + output.len() as u32 - 1;
            let row = job.decode_row(position, Input::Last);
            output.push(sampled(&self.step(vec![row])[0]));
        }
    }

    /// The job by itself, its prompt in one piece.
    fn alone(&mut self, job: &Job) -> Vec<SampledToken> {
        let outputs = self.step(vec![job.prompt_row(0, job.prompt_len(), true)]);
        let mut output = vec![sampled(&outputs[0])];
        self.decode(job, &mut output);
        output
    }

    fn completes_in_order(&mut self) {
        let soon = Instant::now() + Duration::from_millis(20);
        let nothing = self.executor.wait(soon).expect("the executor works");
        assert!(
            nothing.is_none(),
            "nothing was submitted, yet something completed"
        );

        let job = self.job(1, 0, 0);
        let len = job.prompt_len();
        let mut tickets = Vec::new();
        for i in 0..self.capacity.depth {
            let row = match i {
                0 => job.prompt_row(0, len, true),
                _ => job.decode_row(len + i - 1, Input::Last),
            };
            tickets.push(self.submit(
                Lane::Main,
                Batch {
                    rows: vec![row],
                    ..Batch::default()
                },
            ));
        }
        assert!(tickets.is_sorted_by(|a, b| a < b), "tickets ascend");
        let extra = job.decode_row(len + self.capacity.depth - 1, Input::Last);
        self.refused("more batches than the depth", vec![extra]);
        let outputs: Vec<SampledToken> = tickets
            .into_iter()
            .map(|ticket| sampled(&self.wait(ticket, 1)[0]))
            .collect();
        let alone = self.alone(&job);
        let same = alone.len().min(outputs.len());
        assert_eq!(
            outputs[..same],
            alone[..same],
            "steps in flight together give other outputs"
        );
    }

    fn ignores_neighbours(&mut self, expected: &[Vec<SampledToken>]) {
        let jobs = [self.job(0, 0, 0), self.job(1, 1, 1), self.job(2, 2, 2)];
        let mut outputs: [Vec<SampledToken>; 3] = Default::default();
        // Whole prompts and chunks, prefill and decode, in all combinations over the steps.
        let (b, c) = (jobs[1].prompt_len(), jobs[2].prompt_len());
        let first = vec![
            jobs[0].prompt_row(0, jobs[0].prompt_len(), true),
            jobs[1].prompt_row(0, 10, true),
        ];
        outputs[0].push(sampled(&self.step(first)[0]));
        let second = vec![
            jobs[2].prompt_row(0, c, true),
            jobs[1].prompt_row(10, b, false),
            jobs[0].decode_row(jobs[0].prompt_len(), Input::Last),
        ];
        for (which, output) in [2, 1, 0].into_iter().zip(self.step(second)) {
            outputs[which].push(sampled(&output));
        }
        while outputs.iter().any(|output| output.len() < OUTPUT) {
            let live: Vec<usize> = (0..3).filter(|&i| outputs[i].len() < OUTPUT).collect();
            let row = |&i: &usize| {
                let position = jobs[i].prompt_len() + outputs[i].len() as u32 - 1;
                jobs[i].decode_row(position, Input::Last)
            };
            let rows = live.iter().map(row).collect();
            for (which, output) in live.into_iter().zip(self.step(rows)) {
                outputs[which].push(sampled(&output));
            }
        }
        assert_eq!(
            outputs[..],
            *expected,
            "neighbours in the batch change a sequence's output"
        );
    }

    fn ignores_chunking(&mut self, expected: &[Vec<SampledToken>]) {
        let job = self.job(0, 1, 1);
        let cuts = [0, 1, 8, 24, job.prompt_len()];
        let mut output = Vec::new();
        for (i, cut) in cuts.windows(2).enumerate() {
            let outputs = self.step(vec![job.prompt_row(cut[0], cut[1], i == 0)]);
            output.extend(outputs[0].sampled.clone());
        }
        self.decode(&job, &mut output);
        assert_eq!(
            output, expected[0],
            "cutting a prompt into chunks changes its output"
        );
    }

    fn ignores_placement(&mut self, expected: &[Vec<SampledToken>]) {
        let mut job = self.job(1, 2, 0);
        // Backwards through the pool, with gaps.
        let spread = (0..self.width).rev().map(|i| BlockId(3 * i + 1)).collect();
        job.blocks = Arc::new(spread);
        assert_eq!(
            self.alone(&job),
            expected[1],
            "the place of its blocks changes the output"
        );
    }

    fn reads_what_others_computed(&mut self, expected: &[Vec<SampledToken>]) {
        let owner = self.job(0, 0, 0);
        self.alone(&owner);
        // Another sequence begins with the owner's full blocks, and computes the rest.
        let mut job = self.job(0, 1, 1);
        let shared = (job.prompt_len() - 1) / self.capacity.block_size;
        Arc::make_mut(&mut job.blocks)[..shared as usize]
            .copy_from_slice(&owner.blocks[..shared as usize]);
        let start = shared * self.capacity.block_size;
        let outputs = self.step(vec![job.prompt_row(start, job.prompt_len(), true)]);
        let mut output = vec![sampled(&outputs[0])];
        self.decode(&job, &mut output);
        assert_eq!(
            output, expected[0],
            "a prefix computed by another sequence changes the output"
        );
    }

    fn copies_before_rows(&mut self, expected: &[Vec<SampledToken>]) {
        let owner = self.job(0, 0, 0);
        self.alone(&owner);
        let job = self.job(0, 2, 2);
        let pairs = owner.blocks.iter().zip(job.blocks.iter());
        let copies: Vec<_> = pairs.map(|(&src, &dst)| BlockCopy { src, dst }).collect();
        let local_copies = if job.two_pools {
            copies.clone()
        } else {
            Vec::new()
        };
        // The owner's slot starts something new over the source blocks in the same batch.
        let other = self.job(2, 0, 0);
        let rows = vec![
            other.prompt_row(0, other.prompt_len(), true),
            job.prompt_row(job.prompt_len() - 1, job.prompt_len(), true),
        ];
        let batch = Batch {
            copies,
            local_copies,
            rows,
        };
        let outputs = self.step_on(Lane::Main, batch);
        let mut output = vec![sampled(&outputs[1])];
        self.decode(&job, &mut output);
        assert_eq!(
            output, expected[0],
            "block copies must run, whole, before any row"
        );
    }

    fn takes_last_for_the_sampled_token(&mut self, expected: &[Vec<SampledToken>]) {
        let job = self.job(2, 0, 0);
        let len = job.prompt_len();
        let outputs = self.step(vec![job.prompt_row(0, len, true)]);
        let mut output = vec![sampled(&outputs[0])];
        for position in len..len + OUTPUT as u32 - 1 {
            let token = output[output.len() - 1].token;
            let row = job.decode_row(position, Input::Tokens(vec![token]));
            output.push(sampled(&self.step(vec![row])[0]));
        }
        assert_eq!(
            output, expected[2],
            "Input::Last and the token it stands for differ"
        );
    }

    fn recomputes_after_preemption(
        &mut self,
        expected: &[Vec<SampledToken>],
        recompute: Recompute,
    ) {
        let job = self.job(0, 1, 1);
        let before = 3;
        let outputs = self.step(vec![job.prompt_row(0, job.prompt_len(), true)]);
        let mut output = vec![sampled(&outputs[0])];
        while output.len() < before {
            let position = job.prompt_len() + output.len() as u32 - 1;
            let row = job.decode_row(position, Input::Last);
            output.push(sampled(&self.step(vec![row])[0]));
        }
        // Its blocks went; it comes back elsewhere, in the same slot, without a bind.
        let back = Job {
            blocks: self.job(0, 1, 2).blocks,
            ..job
        };
        let mut tokens = back.bind.prompt.to_vec();
        tokens.extend(output.iter().map(|sampled| sampled.token));
        let row = back.decode_row(0, Input::Tokens(tokens));
        output.push(sampled(&self.step(vec![row])[0]));
        if recompute == Recompute::Rounded {
            let [got, want] = [&output, &expected[0]].map(|output| best(&output[before]));
            assert!(
                (got - want).abs() <= ROUNDING,
                "preemption and recomputation change the best token's log-probability from {want} to {got}"
            );
            return;
        }
        self.decode(&back, &mut output);
        assert_eq!(
            output, expected[0],
            "preemption and recomputation change the output"
        );
    }

    fn forgets_at_bind_and_release(&mut self, expected: &[Vec<SampledToken>]) {
        let shaped = self.job(0, 0, 0);
        let plain = self.job(1, 0, 1);
        self.alone(&shaped);
        assert_eq!(
            self.alone(&plain),
            expected[1],
            "a bind leaves state of the slot's last user"
        );
        self.step(vec![shaped.prompt_row(0, shaped.prompt_len(), true)]);
        self.executor.release(shaped.slot);
        self.refused(
            "a released slot without a bind",
            vec![plain.prompt_row(0, 4, false)],
        );
        let output = self.alone(&self.job(2, 0, 1));
        assert_eq!(
            output, expected[2],
            "a release leaves state of the slot's last user"
        );
    }

    fn draws_by_seed(&mut self, expected: &[Vec<SampledToken>]) {
        let mut job = self.job(2, 1, 2);
        assert_eq!(
            self.alone(&job),
            expected[2],
            "the same seed gives other tokens"
        );
        let differs = (100..104).any(|seed| {
            job.bind.seed = seed;
            self.alone(&job) != expected[2]
        });
        assert!(differs, "the seed has no effect");
    }

    /// Masks come after the submission, even after the next one's.
    fn chooses_what_masks_allow(&mut self, expected: &[Vec<SampledToken>]) {
        let vocab = self.capacity.vocab_size;
        let mask = |allowed: &dyn Fn(TokenId) -> bool| -> TokenMask {
            let mut words = vec![0u32; vocab.div_ceil(32) as usize];
            (0..vocab)
                .filter(|&t| allowed(t))
                .for_each(|t| words[t as usize / 32] |= 1 << (t % 32));
            words.into()
        };
        let jobs = [self.job(1, 0, 0), self.job(2, 1, 1), self.job(0, 2, 2)];
        let rows = jobs
            .each_ref()
            .map(|job| job.prompt_row(0, job.prompt_len(), true));
        let [first, second, free] = rows;
        let masked = |row: Row| Row {
            masked: true,
            ..row
        };
        let rows = vec![masked(first), free, masked(second)];
        let ticket = self.submit(
            Lane::Main,
            Batch {
                rows,
                ..Batch::default()
            },
        );
        let next = (self.capacity.depth > 1).then(|| {
            let row = masked(jobs[0].decode_row(jobs[0].prompt_len(), Input::Last));
            self.submit(
                Lane::Main,
                Batch {
                    rows: vec![row],
                    ..Batch::default()
                },
            )
        });
        let soon = Instant::now() + Duration::from_millis(20);
        let early = self.executor.wait(soon).expect("the executor works");
        assert!(
            early.is_none(),
            "a step completes without the masks it waits for"
        );

        let only = vocab - 1;
        let without = |token: TokenId| move |t: TokenId| t != token;
        let best = expected[1][0].token;
        let masks = vec![mask(&without(best)), mask(&|t| t == only)];
        for (what, wrong) in [
            ("masks of another number", masks[..1].to_vec()),
            ("a mask that allows nothing", vec![mask(&|_| false); 2]),
            ("masks of another size", vec![masks[0][1..].into(); 2]),
        ] {
            let result = self.executor.mask(ticket, wrong);
            let refused = matches!(result, Err(ExecutorError::Rejected(_)));
            assert!(refused, "{what}: must be rejected, got {result:?}");
        }
        self.executor
            .mask(ticket, masks.clone())
            .expect("masks are awaited");
        assert!(
            self.executor.mask(ticket, masks).is_err(),
            "masks are given once"
        );
        if let Some(next) = next {
            let mask = mask(&|t| t == only);
            self.executor
                .mask(next, vec![mask])
                .expect("masks are awaited");
        }
        let outputs = self.wait(ticket, 3);
        let [first, free, second] = [0, 1, 2].map(|i| sampled(&outputs[i]));
        assert_ne!(first.token, best, "a masked token was chosen");
        let second_best = expected[1][0]
            .logprobs
            .as_ref()
            .expect("they were asked for")
            .top[1];
        assert_eq!(first.token, second_best.0, "not the best that is allowed");
        assert_eq!(second.token, only, "a masked token was drawn");
        assert_eq!(
            free, expected[0][0],
            "a neighbour's mask changes a sequence's output"
        );
        if let Some(next) = next {
            let output = sampled(&self.wait(next, 1)[0]);
            assert_eq!(output.token, only, "a masked token was chosen");
        }
    }

    fn reports_prompt_logprobs(&mut self) {
        let mut job = self.job(1, 0, 0);
        let with = SamplingParams {
            prompt_logprobs: Some(2),
            ..(*job.bind.sampling).clone()
        };
        job.bind.sampling = Arc::new(with);
        let len = job.prompt_len();
        let mut report = |cuts: &[u32]| -> Vec<Logprobs> {
            let chunks = cuts.windows(2).map(|cut| Row {
                prompt_logprobs: true,
                ..job.prompt_row(cut[0], cut[1], cut[0] == 0)
            });
            chunks
                .flat_map(|row| self.step(vec![row]).remove(0).prompt_logprobs)
                .collect()
        };
        let whole = report(&[0, len]);
        let tokens: Vec<TokenId> = whole.iter().map(|logprobs| logprobs.token).collect();
        assert_eq!(
            tokens,
            job.bind.prompt[1..],
            "one entry for each prompt token but the first"
        );
        for logprobs in &whole {
            assert!(
                logprobs.logprob <= 0.0 && logprobs.rank >= 1,
                "{logprobs:?}: impossible"
            );
            let top = &logprobs.top;
            assert_eq!(
                top.len(),
                2,
                "{logprobs:?}: as many alternatives as were asked for"
            );
            assert!(
                top[0].1 >= top[1].1,
                "{logprobs:?}: alternatives come best first"
            );
        }
        assert_eq!(
            report(&[0, 1, 12, len]),
            whole,
            "chunks change the prompt's logprobs"
        );
    }

    fn hands_over_between_lanes(&mut self, expected: &[Vec<SampledToken>]) {
        let job = self.job(0, 0, 0);
        let rows = vec![job.prompt_row(0, job.prompt_len(), true)];
        let outputs = self.step_on(
            Lane::Prefill,
            Batch {
                rows,
                ..Batch::default()
            },
        );
        let mut output = vec![sampled(&outputs[0])];
        self.decode(&job, &mut output);
        assert_eq!(
            output, expected[0],
            "the lane of the prefill changes the output"
        );
    }

    fn refused(&mut self, what: &str, rows: Vec<Row>) {
        self.refused_batch(
            what,
            Batch {
                rows,
                ..Batch::default()
            },
        );
    }

    fn refused_batch(&mut self, what: &str, batch: Batch) {
        let result = self.executor.submit(Lane::Main, batch);
        assert!(
            matches!(result, Err(ExecutorError::Rejected(_))),
            "{what}: must be rejected, got {result:?}"
        );
    }
}

/// Log-probability of the best token where one was chosen.
fn best(sampled: &SampledToken) -> f32 {
    let logprobs = sampled.logprobs.as_ref().expect("it was asked for them");
    logprobs.top[0].1
}

fn sampled(output: &RowOutput) -> SampledToken {
    assert!(!output.failed, "a row failed");
    let sampled = output.sampled.clone().expect("the row asked for a sample");
    let logprobs = sampled
        .logprobs
        .as_ref()
        .expect("the job asked for logprobs");
    assert_eq!(logprobs.token, sampled.token, "logprobs of another token");
    assert_eq!(
        logprobs.top.len(),
        3,
        "as many alternatives as were asked for"
    );
    sampled
}
