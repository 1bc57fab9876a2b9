//! A scheduler whose executor does what the test says.

use std::sync::Arc;

use spate_executor::{Batch, Capacity, Input, Lane, RowOutput};
use spate_scheduler::{Event, Scheduler, SchedulerConfig};
use spate_types::{
    FinishReason, GenerationRequest, RequestId, SampledToken, SamplingParams, StopParams, TokenId,
    Usage,
};

pub(crate) const EOS: TokenId = 99;

pub(crate) fn capacity() -> Capacity {
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

pub(crate) fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 4,
        max_batch_tokens: 8,
        max_model_len: 64,
        max_waiting: 10,
        prefix_caching: true,
    }
}

/// A request whose prompt is `prompt_len` tokens that no other id shares.
pub(crate) fn request(id: u64, prompt_len: u32, max_tokens: u32) -> GenerationRequest {
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
pub(crate) struct Bench {
    pub(crate) scheduler: Scheduler,
    pub(crate) now: u64,
    pub(crate) events: Vec<Event>,
}

impl Bench {
    pub(crate) fn new(config: SchedulerConfig, capacity: Capacity) -> Self {
        Self {
            scheduler: Scheduler::new(config, capacity),
            now: 0,
            events: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, request: GenerationRequest) {
        self.scheduler.add(request, self.now).unwrap();
    }

    pub(crate) fn plan_batch(&mut self, lane: Lane) -> Option<Batch> {
        let batch = self.scheduler.plan(lane, self.now);
        self.scheduler.check_invariants();
        self.events.extend(self.scheduler.take_events());
        batch
    }

    pub(crate) fn plan(&mut self) -> Vec<String> {
        self.plan_on(Lane::Main)
    }

    pub(crate) fn plan_on(&mut self, lane: Lane) -> Vec<String> {
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
    pub(crate) fn commit(&mut self, tokens: &[Option<TokenId>]) {
        self.commit_on(Lane::Main, tokens);
    }

    pub(crate) fn commit_on(&mut self, lane: Lane, tokens: &[Option<TokenId>]) {
        let output = |token: &Option<TokenId>| RowOutput {
            sampled: token.map(|token| SampledToken {
                token,
                logprobs: None,
            }),
            ..RowOutput::default()
        };
        self.commit_outputs(lane, tokens.iter().map(output).collect());
    }

    pub(crate) fn commit_outputs(&mut self, lane: Lane, outputs: Vec<RowOutput>) {
        self.now += 10;
        self.scheduler.commit(lane, outputs, self.now);
        self.scheduler.check_invariants();
        self.events.extend(self.scheduler.take_events());
    }

    pub(crate) fn finished(&self) -> Vec<(u64, u32, FinishReason)> {
        let ends = self.events.iter().filter_map(|event| match event {
            Event::Finished { seq, reason } => Some((seq.request.0, seq.index, *reason)),
            _ => None,
        });
        ends.collect()
    }

    pub(crate) fn usage(&self, id: u64) -> Option<Usage> {
        self.events.iter().find_map(|event| match event {
            Event::Done { request, usage, .. } if request.0 == id => Some(*usage),
            _ => None,
        })
    }
}
