use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use spate_executor::{Capacity, LocalKv};
use spate_kvcache::BlockManager;
use spate_types::{
    BlockId, BlockIds, FinishReason, GenerationRequest, LocalBlocks, Micros, RequestId, SeqId,
    Slot, Timings, Usage,
};

use crate::sequence::{Rank, Sequence};
use crate::slots::Slots;
use crate::{AddError, Event, Stats};

/// What the scheduler may do; the rest follows from the executor's capacity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Most sequences running at once.
    pub max_num_seqs: u32,
    /// Most input tokens in one step.
    pub max_batch_tokens: u32,
    /// Most tokens in one sequence, prompt and output.
    pub max_model_len: u32,
    /// Most sequences waiting while `max_num_seqs` run; more are refused.
    pub max_waiting: u32,
    /// Share KV blocks between sequences that begin alike.
    pub prefix_caching: bool,
}

impl SchedulerConfig {
    /// Most sequences in the scheduler at once, running and waiting.
    pub fn max_live(&self) -> u32 {
        self.max_num_seqs.saturating_add(self.max_waiting)
    }
}

/// Decides who computes what in the next step, and follows what came of it.
///
/// The caller's loop: [`plan`](Self::plan) each lane with one and the same `now` and submit what
/// comes; [`commit`](Self::commit) what the executor completes; deliver
/// [`take_events`](Self::take_events); tell the executor of [`take_released`](Self::take_released).
/// When a pass over all lanes plans nothing and nothing is in flight, nothing will happen before
/// the next `add`, `finish` or [`next_deadline`](Self::next_deadline).
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) capacity: Capacity,
    pub(crate) blocks: BlockManager,
    pub(crate) slots: Slots,
    pub(crate) requests: HashMap<RequestId, Request>,
    /// In line order. A sequence is in exactly one of `waiting` and `running`, unless it is still
    /// unborn (see [`Request::unborn`]).
    pub(crate) waiting: BTreeMap<Rank, Sequence>,
    pub(crate) running: BTreeMap<Rank, Sequence>,
    pub(crate) unborn: u32,
    pub(crate) deadlines: BTreeSet<(Micros, RequestId)>,
    /// Steps submitted and not yet committed, oldest first, per lane.
    pub(crate) in_flight: [VecDeque<Step>; 2],
    pub(crate) next_step: u64,
    next_arrival: u64,
    /// The head of the line that could not start, and the blocks that were available then, in both
    /// pools: it is not looked at again (a prefix lookup takes time) before there are more.
    pub(crate) starved: Option<(Rank, [u32; 2])>,
    pub(crate) events: Vec<Event>,
    /// Only the counters; `stats` fills in the gauges.
    pub(crate) counters: Stats,
}

/// A live request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) request: Arc<GenerationRequest>,
    pub(crate) arrival: u64,
    /// Sequences 1.. until sequence 0 has computed the prompt, which they then share. Should it end
    /// before that, they line up like anyone else.
    pub(crate) unborn: BTreeSet<u32>,
    /// Sequences that have not ended.
    pub(crate) live: u32,
    /// One of its sequences has run.
    pub(crate) started: bool,
    /// The next prompt position whose logprobs are to be delivered.
    pub(crate) next_prompt_logprob: u32,
    pub(crate) usage: Usage,
    pub(crate) timings: Timings,
}

impl Request {
    pub(crate) fn rank(&self, index: u32) -> Rank {
        Rank {
            priority: self.request.priority,
            arrival: self.arrival,
            index,
        }
    }

    /// Whether prompt logprobs are still to be delivered: then the prompt must be computed, cached
    /// or not.
    pub(crate) fn wants_prompt_logprobs(&self) -> bool {
        self.request.sampling.prompt_logprobs.is_some()
            && (self.next_prompt_logprob as usize) < self.request.prompt.len()
    }
}

/// A submitted batch.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) number: u64,
    pub(crate) rows: Vec<StepRow>,
    /// Given up when this step is committed: it, or one before it, may use them until then.
    pub(crate) retired_blocks: Vec<BlockId>,
    pub(crate) retired_local: Vec<BlockId>,
    pub(crate) retired_slots: Vec<Slot>,
}

/// What `commit` must know of a submitted row.
#[derive(Debug)]
pub(crate) struct StepRow {
    pub(crate) rank: Rank,
    pub(crate) start: u32,
    pub(crate) end: u32,
    pub(crate) sample: bool,
    /// What the row was planned with, to check that it stays held.
    pub(crate) blocks: BlockIds,
    pub(crate) local: LocalBlocks,
}

impl Scheduler {
    /// Nothing to do yet.
    ///
    /// # Panics
    /// If the capacity's local pool is smaller than [`LocalKv`] says.
    pub fn new(config: SchedulerConfig, capacity: Capacity) -> Self {
        let (size, tokens) = (capacity.block_size, capacity.max_batch_tokens);
        let mut blocks = BlockManager::new(capacity.blocks, size, config.prefix_caching);
        if let Some(LocalKv {
            window,
            blocks: own,
        }) = capacity.local
        {
            assert!(
                own >= LocalKv::least_blocks(window, size, tokens),
                "the local pool can't hold a window of {window} and a step of {tokens} tokens"
            );
            blocks = blocks.with_local(own, window);
        }
        Self {
            blocks,
            slots: Slots::new(capacity.slots),
            config,
            capacity,
            requests: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            unborn: 0,
            deadlines: BTreeSet::new(),
            in_flight: Default::default(),
            next_step: 1,
            next_arrival: 0,
            starved: None,
            events: Vec::new(),
            counters: Stats::default(),
        }
    }

    /// The checks of [`add`](Self::add) that depend on nothing but configuration.
    ///
    /// # Errors
    /// Any [`AddError`] but [`AddError::QueueFull`].
    pub fn validate(
        config: &SchedulerConfig,
        capacity: &Capacity,
        request: &GenerationRequest,
    ) -> Result<(), AddError> {
        let invalid = |what| Err(AddError::Invalid(what));
        let (prompt, sampling, stop) = (&request.prompt, &request.sampling, &request.stop);
        if prompt.is_empty() {
            return invalid("the prompt is empty");
        }
        if request.n == 0 || request.n > config.max_live() {
            return invalid("n must be at least 1 and at most what may run and wait together");
        }
        if stop.max_tokens == 0 {
            return invalid("max_tokens must be at least 1");
        }
        let max_len = max_len(config, capacity) as usize;
        if prompt.len() >= max_len {
            let max = max_len.saturating_sub(1);
            return Err(AddError::PromptTooLong {
                len: prompt.len(),
                max,
            });
        }
        // The last token's KV is never computed.
        let need_tokens = (prompt.len() + stop.max_tokens as usize).min(max_len) - 1;
        let have_tokens = capacity.blocks as usize * capacity.block_size as usize;
        if need_tokens > have_tokens {
            return Err(AddError::NeedsMoreKv {
                need_tokens,
                have_tokens,
            });
        }
        let known = |id: &u32| *id < capacity.vocab_size;
        if !prompt.iter().all(known) {
            return invalid("a prompt token id is not in the vocabulary");
        }
        if !sampling.logit_bias.iter().all(|(id, _)| known(id)) {
            return invalid("a logit_bias id is not in the vocabulary");
        }
        if !stop.eos_ids.iter().chain(&stop.token_ids).all(known)
            || !sampling.min_tokens_banned.iter().all(known)
        {
            return invalid("a stop token id is not in the vocabulary");
        }
        let most = sampling.logprobs.max(sampling.prompt_logprobs).unwrap_or(0);
        if most > capacity.vocab_size {
            return invalid("more logprobs were asked for than the vocabulary has tokens");
        }
        Ok(())
    }

    /// Takes a request into the waiting line.
    ///
    /// # Errors
    /// See [`AddError`]; the scheduler is then as it was.
    pub fn add(&mut self, request: GenerationRequest, now: Micros) -> Result<(), AddError> {
        Self::validate(&self.config, &self.capacity, &request)?;
        if self.requests.contains_key(&request.id) {
            return Err(AddError::Invalid("a request of this id is live"));
        }
        let live = self.num_waiting() + self.running.len() as u32;
        if live > self.config.max_live() - request.n {
            return Err(AddError::QueueFull);
        }
        let request = Arc::new(request);
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        if let Some(deadline) = request.deadline {
            self.deadlines.insert((deadline, request.id));
        }
        let live = Request {
            arrival,
            unborn: (1..request.n).collect(),
            live: request.n,
            started: false,
            next_prompt_logprob: 1,
            usage: Usage {
                prompt_tokens: request.prompt.len() as u32,
                ..Usage::default()
            },
            timings: Timings {
                arrived: now,
                ..Timings::default()
            },
            request: Arc::clone(&request),
        };
        self.unborn += request.n - 1;
        self.line_up(&request, live.rank(0));
        self.requests.insert(request.id, live);
        Ok(())
    }

    /// Ends one sequence (`Some(index)`) or the whole request. Unknown ids are fine: it may just
    /// have ended.
    pub fn finish(&mut self, id: RequestId, index: Option<u32>, reason: FinishReason, now: Micros) {
        let Some(request) = self.requests.get(&id) else {
            return;
        };
        let n = request.request.n;
        // Last first: the end of sequence 0 would give birth to the unborn.
        let indices = index.map_or(0..n, |index| index..index.saturating_add(1).min(n));
        for index in indices.rev() {
            self.end(id, index, reason, now);
        }
    }

    /// Everything that happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Slots whose sequences ended and that no batch in flight names: tell the executor before the
    /// next [`plan`](Self::plan).
    pub fn take_released(&mut self) -> Vec<Slot> {
        self.slots.take_released()
    }

    /// The earliest deadline of a live request.
    pub fn next_deadline(&self) -> Option<Micros> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// No live request and nothing in flight.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.in_flight.iter().all(VecDeque::is_empty)
    }

    /// Gauges and counters.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len() as u32,
            waiting: self.num_waiting(),
            blocks_total: self.blocks.total(),
            blocks_used: self.blocks.used(),
            blocks_cached: self.blocks.cached(),
            local_blocks_total: self.capacity.local.map_or(0, |local| local.blocks),
            local_blocks_used: self.blocks.local_used(),
            in_flight_rows: self
                .in_flight
                .iter()
                .flatten()
                .map(|s| s.rows.len() as u32)
                .sum(),
            ..self.counters
        }
    }

    fn num_waiting(&self) -> u32 {
        self.waiting.len() as u32 + self.unborn
    }

    /// Puts a new sequence into the waiting line.
    pub(crate) fn line_up(&mut self, request: &Arc<GenerationRequest>, rank: Rank) {
        let max_len = max_len(&self.config, &self.capacity);
        self.waiting
            .insert(rank, Sequence::new(request, rank.index, max_len));
    }

    /// Ends a sequence, wherever it is. Does nothing if it ended before.
    pub(crate) fn end(&mut self, id: RequestId, index: u32, reason: FinishReason, now: Micros) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let rank = request.rank(index);
        if request.unborn.remove(&index) {
            self.unborn -= 1;
        } else if let Some(seq) = self
            .running
            .remove(&rank)
            .or_else(|| self.waiting.remove(&rank))
        {
            self.retire(seq);
        } else {
            return;
        }
        self.events.push(Event::Finished {
            seq: SeqId { request: id, index },
            reason,
        });

        let request = self.requests.get_mut(&id).expect("found above");
        request.live -= 1;
        if request.live == 0 {
            request.timings.finished = now;
            let (usage, timings) = (request.usage, request.timings);
            if let Some(deadline) = request.request.deadline {
                self.deadlines.remove(&(deadline, id));
            }
            self.requests.remove(&id);
            self.events.push(Event::Done {
                request: id,
                usage,
                timings,
            });
        } else if index == 0 {
            // Nothing to fork from any more.
            let shared = Arc::clone(&request.request);
            let arrival = request.arrival;
            let unborn = std::mem::take(&mut request.unborn);
            self.unborn -= unborn.len() as u32;
            for index in unborn {
                self.line_up(
                    &shared,
                    Rank {
                        priority: shared.priority,
                        arrival,
                        index,
                    },
                );
            }
        }
    }

    /// Gives up what an ended sequence holds, once no batch in flight names it.
    fn retire(&mut self, mut seq: Sequence) {
        let slot = seq.slot.take();
        match last_step_of(&mut self.in_flight, &seq) {
            Some(step) => step.retired_slots.extend(slot),
            None => slot.into_iter().for_each(|slot| self.slots.release(slot)),
        }
        self.retire_table(&mut seq);
    }

    /// Gives up a sequence's blocks, once no batch in flight names them.
    pub(crate) fn retire_table(&mut self, seq: &mut Sequence) {
        let table = std::mem::take(&mut seq.table);
        match last_step_of(&mut self.in_flight, seq) {
            Some(step) => {
                // Children before parents, as `BlockManager::release` does.
                step.retired_blocks.extend(table.blocks().iter().rev());
                step.retired_local.extend(table.local().blocks.iter().rev());
            }
            None => self.blocks.release(table),
        }
    }

    /// Ends the requests whose deadline has come.
    pub(crate) fn expire(&mut self, now: Micros) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.finish(id, None, FinishReason::Deadline, now);
        }
    }
}

/// Most tokens in one sequence.
fn max_len(config: &SchedulerConfig, capacity: &Capacity) -> u32 {
    config.max_model_len.min(capacity.max_seq_len)
}

/// The newest step in flight that has a row of `seq`.
pub(crate) fn last_step_of<'a>(
    in_flight: &'a mut [VecDeque<Step>; 2],
    seq: &Sequence,
) -> Option<&'a mut Step> {
    let steps = &mut in_flight[seq.lane as usize];
    steps
        .iter_mut()
        .find(|step| seq.in_flight > 0 && step.number == seq.last_step)
}
