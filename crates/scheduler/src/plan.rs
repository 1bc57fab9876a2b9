use std::sync::Arc;

use spate_executor::{Batch, Bind, BlockCopy, Input, Lane, Row};
use spate_kvcache::{Copies, OutOfBlocks, PrefixMatch};
use spate_types::Micros;

use crate::policy::{self, Demand};
use crate::scheduler::{Scheduler, Step, StepRow};
use crate::sequence::{Rank, Sequence};

/// A step under construction.
struct Draft {
    lane: Lane,
    budget: u32,
    batch: Batch,
    step: Step,
}

impl Draft {
    fn copy(&mut self, copies: Copies) {
        if let Some((src, dst)) = copies.main {
            self.batch.copies.push(BlockCopy { src, dst });
            self.step.retired_blocks.push(src);
        }
        if let Some((src, dst)) = copies.local {
            self.batch.local_copies.push(BlockCopy { src, dst });
            self.step.retired_local.push(src);
        }
    }
}

impl Scheduler {
    /// The next step for `lane`, which the caller must submit; or `None` when there is nothing to
    /// run on it now. Expires deadlines first.
    pub fn plan(&mut self, lane: Lane, now: Micros) -> Option<Batch> {
        self.expire(now);
        let depth = self.capacity.depth as usize;
        if !self.capacity.lanes.contains(&lane) || self.in_flight[lane as usize].len() >= depth {
            return None;
        }
        let step = Step {
            number: self.next_step,
            rows: Vec::new(),
            retired_blocks: Vec::new(),
            retired_local: Vec::new(),
            retired_slots: Vec::new(),
        };
        let (decodes, prompts) = self.runnable(lane);
        let pace = policy::step_budget(&self.demand(&decodes, &prompts), &self.capacity);
        let mut draft = Draft {
            lane,
            budget: pace.min(self.config.max_batch_tokens),
            batch: Batch::default(),
            step,
        };

        self.favour_first(&mut draft, &decodes, &prompts);
        for rank in decodes.into_iter().chain(prompts) {
            self.plan_row(&mut draft, rank);
        }
        self.start_waiting(&mut draft, now);

        if draft.batch.rows.is_empty() {
            return None;
        }
        self.next_step += 1;
        self.in_flight[lane as usize].push_back(draft.step);
        Some(draft.batch)
    }

    /// The running sequences that have something to compute on `lane`, in line order: those with
    /// one position to go, and the others.
    fn runnable(&self, lane: Lane) -> (Vec<Rank>, Vec<Rank>) {
        let (mut decodes, mut prompts) = (Vec::new(), Vec::new());
        for (&rank, seq) in self.running.iter().filter(|(_, seq)| seq.lane == lane) {
            match seq.remaining() {
                0 => {}
                // Only prompts run on the prefill lane: its sequences decode on the main one, after
                // the commit that moves them there.
                _ if lane == Lane::Prefill && seq.pending > 0 => {}
                1 => decodes.push(rank),
                _ => prompts.push(rank),
            }
        }
        (decodes, prompts)
    }

    fn demand(&self, decodes: &[Rank], prompts: &[Rank]) -> Demand {
        let running = prompts.iter().map(|rank| self.running[rank].remaining());
        let waiting = self.waiting.values().map(Sequence::len);
        Demand {
            decodes: decodes.len() as u32,
            backlog: running.chain(waiting).fold(0, u32::saturating_add),
        }
    }

    /// The first in line always progresses. If it is at its prompt, whose rows come after the
    /// decodes, it gets its room while no row of this step protects who must give way.
    fn favour_first(&mut self, draft: &mut Draft, decodes: &[Rank], prompts: &[Rank]) {
        let Some(&first) = prompts.first() else {
            return;
        };
        if decodes.first().is_none_or(|&decode| first < decode) {
            let seq = &self.running[&first];
            let budget = draft.budget.saturating_sub(decodes.len() as u32);
            let (start, end) = (seq.planned, seq.planned + seq.remaining().min(budget));
            // Whether there was room shows when its turn comes.
            let _room = start < end && self.make_room(draft, first, start, end);
        }
    }

    /// Adds a row for a running sequence, unless the budget is used up or memory is short.
    fn plan_row(&mut self, draft: &mut Draft, rank: Rank) {
        // An earlier row of this step may have preempted it.
        let Some(seq) = self.running.get(&rank) else {
            return;
        };
        let start = seq.planned;
        let end = start + seq.remaining().min(draft.budget);
        if start == end || !self.make_room(draft, rank, start, end) {
            return;
        }
        let seq = self
            .running
            .get_mut(&rank)
            .expect("make_room spares the sequence itself");
        let wants_logprobs = seq.request.sampling.prompt_logprobs.is_some()
            && self
                .requests
                .get(&seq.id.request)
                .is_some_and(|r| r.wants_prompt_logprobs());
        let row = Row {
            slot: seq.slot.expect("running sequences have a slot"),
            bind: (!seq.bound).then(|| Bind {
                prompt: Arc::clone(&seq.request.prompt),
                sampling: Arc::clone(&seq.request.sampling),
                seed: seq
                    .request
                    .sampling
                    .seed
                    .wrapping_add(u64::from(seq.id.index)),
            }),
            start,
            input: input(seq, start, end),
            blocks: Arc::clone(seq.table.blocks()),
            local: seq.table.local().clone(),
            sample: end == seq.len(),
            masked: false,
            prompt_logprobs: wants_logprobs && start + 1 < seq.prompt_len(),
        };
        seq.bound = true;
        seq.planned = end;
        seq.pending += u32::from(row.sample);
        seq.in_flight += 1;
        seq.last_step = draft.step.number;
        draft.budget -= end - start;
        draft.step.rows.push(StepRow {
            rank,
            start,
            end,
            sample: row.sample,
            blocks: Arc::clone(&row.blocks),
            local: row.local.clone(),
        });
        draft.batch.rows.push(row);
    }

    /// Makes positions `start .. end` writable, preempting others if that helps. `false`: not now.
    fn make_room(&mut self, draft: &mut Draft, rank: Rank, start: u32, end: u32) -> bool {
        loop {
            let seq = self.running.get_mut(&rank).expect("the caller found it");
            match self.blocks.reserve(&mut seq.table, start, end) {
                Ok(copies) => {
                    draft.copy(copies);
                    return true;
                }
                // Its own steps will leave blocks behind the window.
                Err(OutOfBlocks::Local) if seq.in_flight > 0 => return false,
                Err(_) => {}
            }
            // Blocks that will come free are waited for before anybody loses its own.
            let mut steps = self.in_flight.iter().flatten();
            if steps.any(|s| !s.retired_blocks.is_empty() || !s.retired_local.is_empty()) {
                return false;
            }
            let victim = policy::victim(&self.running, rank);
            // Those that have a row in this step keep what it reads.
            let spared = |victim: &Rank| self.running[victim].last_step == draft.step.number;
            let Some(victim) = victim.filter(|victim| !spared(victim)) else {
                return false;
            };
            self.preempt(victim);
        }
    }

    /// Takes a running sequence's blocks away and puts it back in line, which is at the front of
    /// those of its priority that have not run yet.
    fn preempt(&mut self, rank: Rank) {
        let mut seq = self.running.remove(&rank).expect("a victim is running");
        self.retire_table(&mut seq);
        seq.planned = 0;
        seq.committed = 0;
        self.counters.preemptions += 1;
        if let Some(request) = self.requests.get_mut(&seq.id.request) {
            request.timings.preemptions += 1;
        }
        self.waiting.insert(rank, seq);
    }

    /// Starts waiting sequences in line order, until one must wait on.
    fn start_waiting(&mut self, draft: &mut Draft, now: Micros) {
        while draft.budget > 0
            && self.running.len() < self.config.max_num_seqs as usize
            && let Some(rank) = self.start_head(draft.lane, now)
        {
            if self.running[&rank].lane == draft.lane {
                self.plan_row(draft, rank);
            }
        }
    }

    /// Moves the head of the line to the running sequences, with the blocks for all its tokens.
    fn start_head(&mut self, lane: Lane, now: Micros) -> Option<Rank> {
        let (&rank, seq) = self.waiting.first_key_value()?;
        let available = [self.blocks.available(), self.blocks.local_available()];
        let more = |had: [u32; 2]| available[0] > had[0] || available[1] > had[1];
        if self
            .starved
            .is_some_and(|(who, had)| who == rank && !more(had))
        {
            return None;
        }
        // Preempted with rows in flight: their tokens are needed first.
        if seq.in_flight > 0 || (seq.slot.is_none() && self.slots.available() == 0) {
            return None;
        }
        let request = &self.requests[&seq.id.request];
        let salt = seq.request.cache_salt.as_ref();
        let found = if request.wants_prompt_logprobs() {
            PrefixMatch::default()
        } else {
            self.blocks.lookup(salt, &seq.tokens)
        };
        let cached = found.len() * self.capacity.block_size;
        let decoding = self
            .running
            .values()
            .any(|seq| seq.committed >= seq.prompt_len());
        let start_lane = policy::lane(seq.len() - cached, decoding, &self.capacity);
        // The main lane starts sequences for both, so that a long prompt at the head does not hold
        // up the others; the prefill lane only its own.
        if lane == Lane::Prefill && start_lane != lane {
            return None;
        }
        let needed = policy::blocks_to_start(seq, &self.capacity).saturating_sub(found.len());
        let needed_local = policy::local_blocks_to_start(seq, &self.capacity, &found);
        if needed + found.unreferenced() > available[0]
            || needed_local + found.local_unreferenced() > available[1]
        {
            self.starved = Some((rank, available));
            return None;
        }

        let mut seq = self.waiting.remove(&rank).expect("it is the head");
        seq.table = self.blocks.adopt(found, seq.request.cache_salt.clone());
        let len = seq.len();
        self.blocks
            .extend(&mut seq.table, len)
            .expect("the blocks were counted");
        seq.planned = cached;
        seq.committed = cached;
        seq.lane = start_lane;
        if seq.slot.is_none() {
            seq.slot = self.slots.take();
            self.count_first_start(&seq, cached, now);
        }
        self.running.insert(rank, seq);
        Some(rank)
    }

    fn count_first_start(&mut self, seq: &Sequence, cached: u32, now: Micros) {
        let request = self
            .requests
            .get_mut(&seq.id.request)
            .expect("its sequence is live");
        if self.config.prefix_caching && !request.wants_prompt_logprobs() {
            self.counters.prefix_queries_tokens += u64::from(seq.len());
            self.counters.prefix_hit_tokens += u64::from(cached);
        }
        if !request.started {
            request.started = true;
            request.timings.scheduled = now;
            request.usage.cached_tokens = cached;
            self.counters.prompt_tokens += u64::from(seq.len());
            self.counters.cached_prompt_tokens += u64::from(cached);
        }
    }
}

/// The input of a row. A token that the executor sampled last is not sent back to it.
fn input(seq: &Sequence, start: u32, end: u32) -> Input {
    let sampled_before = seq.len() > seq.prompt_len();
    if sampled_before && end - start == 1 && end == seq.len() {
        Input::Last
    } else {
        Input::Tokens(seq.tokens[start as usize..end as usize].to_vec())
    }
}
