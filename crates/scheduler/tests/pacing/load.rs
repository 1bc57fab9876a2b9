//! Workloads, and the scheduler under them in virtual time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use spate_executor::{Batch, Capacity, Lane, RowOutput};
use spate_scheduler::{Event, Scheduler, SchedulerConfig};
use spate_types::{GenerationRequest, RequestId, SampledToken, SamplingParams, StopParams};

use crate::device::step_ms;

/// Milliseconds from an answer's end to the arrival of its client's next request.
const CLIENT: f64 = 1.0;

/// Milliseconds between the first requests of two clients.
const APART: f64 = 0.05;

/// Steps that are submitted ahead of the device.
const DEPTH: u32 = 2;

/// Clients that send so many requests in all, each its next one when the last is answered; and, for a
/// flood, long prompts beside them.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) clients: u32,
    pub(crate) requests: u32,
    pub(crate) prompt: u32,
    pub(crate) output: u32,
    /// Four of five prompts begin with so many tokens that the cache has.
    pub(crate) shared: u32,
    /// Prompts of 8192 tokens, two a second.
    pub(crate) flood: u32,
}

/// Mean, median and 99th percentile.
pub(crate) type Spread = [f64; 3];

/// What came of a load. Milliseconds.
pub(crate) struct Outcome {
    /// Output tokens a second.
    pub(crate) rate: f64,
    /// From sending a request to its first token; of a flood, the long prompts'.
    pub(crate) ttft: Spread,
    /// Between two tokens; of a flood, the clients'.
    pub(crate) itl: Spread,
}

/// Runs a load to its end, with this [`Capacity::step_tokens`].
pub(crate) fn run(load: &Load, step_tokens: Option<u32>) -> Outcome {
    let mut run = Run::new(*load, step_tokens);
    if load.shared > 0 {
        run.send(run.now, load.prompt, 1, false);
        run.finish();
    }
    let start = run.now;
    (run.tokens, run.ttft) = Default::default();
    for client in 0..load.clients {
        run.unsent -= 1;
        let at = start + f64::from(client) * APART;
        run.send(at, load.prompt, load.output, false);
    }
    let mut at = start;
    for number in 0..load.flood {
        // Unevenly: a mean of 500.
        at += [100.0, 900.0, 500.0, 300.0, 700.0][number as usize % 5];
        run.send(at, 8192, 16, true);
    }
    run.finish();
    let ttft = usize::from(load.flood > 0);
    Outcome {
        rate: run.tokens as f64 / (run.now - start) * 1000.0,
        ttft: spread(&mut run.ttft[ttft]),
        itl: spread(&mut run.itl[0]),
    }
}

fn spread(values: &mut [f64]) -> Spread {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    [mean, at(0.5), at(0.99)]
}

/// A request that was sent.
struct Sent {
    at: f64,
    /// When its last token came.
    last: Option<f64>,
    flood: bool,
}

struct Run {
    load: Load,
    scheduler: Scheduler,
    now: f64,
    /// Steps in flight, by the time of their end.
    steps: VecDeque<(f64, Batch)>,
    /// Requests under way to the scheduler.
    coming: Vec<(f64, GenerationRequest)>,
    sent: BTreeMap<RequestId, Sent>,
    /// Requests that the clients will still send.
    unsent: u32,
    /// Output tokens.
    tokens: u64,
    /// Of the clients, of the flood.
    ttft: [Vec<f64>; 2],
    itl: [Vec<f64>; 2],
}

impl Run {
    fn new(load: Load, step_tokens: Option<u32>) -> Self {
        let capacity = Capacity {
            slots: 256,
            blocks: 25_000,
            block_size: 16,
            local: None,
            max_batch_tokens: 8192,
            step_tokens,
            max_seq_len: 16_384,
            vocab_size: u32::MAX,
            lanes: vec![Lane::Main],
            depth: DEPTH,
        };
        let config = SchedulerConfig {
            max_num_seqs: capacity.slots,
            max_batch_tokens: capacity.max_batch_tokens,
            max_model_len: capacity.max_seq_len,
            max_waiting: 1000,
            prefix_caching: true,
        };
        Self {
            load,
            scheduler: Scheduler::new(config, capacity),
            now: 0.0,
            steps: VecDeque::new(),
            coming: Vec::new(),
            sent: BTreeMap::new(),
            unsent: load.requests,
            tokens: 0,
            ttft: Default::default(),
            itl: Default::default(),
        }
    }

    fn send(&mut self, at: f64, prompt: u32, output: u32, flood: bool) {
        let number = self.sent.len() as u32;
        let shared = if number % 5 == 4 { 0 } else { self.load.shared };
        // Nothing but the shared part is in two prompts.
        let token = |i| {
            if i < shared {
                i
            } else {
                (number + 1) << 16 | i
            }
        };
        let request = GenerationRequest {
            id: RequestId(number.into()),
            prompt: (0..prompt).map(token).collect(),
            sampling: Arc::new(SamplingParams::default()),
            stop: Arc::new(StopParams {
                max_tokens: output,
                eos_ids: vec![],
                token_ids: vec![],
            }),
            n: 1,
            priority: 0,
            cache_salt: None,
            deadline: None,
        };
        let last = None;
        self.sent.insert(request.id, Sent { at, last, flood });
        self.coming.push((at, request));
    }

    /// Until nothing comes any more, as the engine would: it looks at what has arrived when a step is done.
    fn finish(&mut self) {
        loop {
            let clock = self.clock();
            for (_, request) in self.coming.extract_if(.., |&mut (at, _)| at <= self.now) {
                self.scheduler.add(request, clock).unwrap();
            }
            while self.steps.len() < DEPTH as usize
                && let Some(batch) = self.scheduler.plan(Lane::Main, clock)
            {
                let begin = self.steps.back().map_or(self.now, |&(end, _)| end);
                self.steps.push_back((begin + step_ms(&batch), batch));
            }
            if let Some((end, batch)) = self.steps.pop_front() {
                self.now = end;
                self.commit(&batch);
            } else if let Some(next) = self.coming.iter().map(|(at, _)| *at).reduce(f64::min) {
                self.now = next;
            } else {
                return;
            }
        }
    }

    fn clock(&self) -> u64 {
        (self.now * 1000.0) as u64
    }

    fn commit(&mut self, batch: &Batch) {
        let token = SampledToken {
            token: 0,
            logprobs: None,
        };
        let outputs = batch.rows.iter().map(|row| RowOutput {
            sampled: row.sample.then(|| token.clone()),
            ..RowOutput::default()
        });
        let clock = self.clock();
        self.scheduler.commit(Lane::Main, outputs.collect(), clock);
        for event in self.scheduler.take_events() {
            match event {
                Event::Token { seq, .. } => {
                    self.tokens += 1;
                    let sent = self.sent.get_mut(&seq.request).unwrap();
                    let of = usize::from(sent.flood);
                    match sent.last.replace(self.now) {
                        None => self.ttft[of].push(self.now - sent.at),
                        Some(last) => self.itl[of].push(self.now - last),
                    }
                }
                Event::Done { request, .. } => {
                    let client = !self.sent[&request].flood && self.unsent < self.load.requests;
                    if client && self.unsent > 0 {
                        self.unsent -= 1;
                        let Load { prompt, output, .. } = self.load;
                        self.send(self.now + CLIENT, prompt, output, false);
                    }
                }
                Event::PromptLogprobs { .. } | Event::Finished { .. } => {}
            }
        }
        self.scheduler.take_released();
    }
}
