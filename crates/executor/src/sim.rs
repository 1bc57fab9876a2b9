//! An executor without a model: deterministic, instant, and strict.

mod model;

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use spate_types::{BlockId, FinishReason, GenerationRequest, Slot, TokenId};

use crate::{
    Batch, Bind, Capacity, Completion, Contract, Executor, ExecutorError, Input, Lane, Row,
    RowOutput, Ticket, TokenMask,
};
use model::{Model, mix};

/// How a [`SimExecutor`] behaves.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// What it says it can hold.
    pub capacity: Capacity,
    /// Picks the pretend model, and which lane is faster when two are busy.
    pub seed: u64,
    /// Real time that each step takes; zero: a step is done as soon as it is waited for.
    pub step_time: Duration,
    /// A row fails (as if its logits were not finite) when this token is anywhere in its sequence.
    pub fail_token: Option<TokenId>,
    /// The device is lost after so many steps.
    pub fatal_after: Option<u64>,
    /// The device hangs after so many steps: nothing completes any more.
    pub hang_after: Option<u64>,
    /// The driver hangs after so many steps: the call never returns.
    pub stuck_after: Option<u64>,
}

impl SimConfig {
    /// No faults, no delay.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            seed: 0,
            step_time: Duration::ZERO,
            fail_token: None,
            fatal_after: None,
            hang_after: None,
            stuck_after: None,
        }
    }
}

/// Pretends to run a model, and finds fault with whoever drives it.
///
/// Its KV pool holds, per position, the token and a digest of all tokens before it. A row's token is
/// computed, as attention would, from every position it reads through its block table; so a wrong
/// block, a stale one, or one overwritten too early changes the output, which
/// [`reference`](Self::reference) predicts for a sequence alone. Steps run as late as they can, in
/// [`wait`](Executor::wait), and it is left to chance (seeded) which of two busy lanes is faster.
///
/// Of the sampling parameters it knows temperature and seed, `top_k`, `min_tokens` and logprobs;
/// penalties, `top_p` and `min_p` do nothing. A `logit_bias` of 100 or more forces its token, one of
/// -100 or less bans it.
#[derive(Debug)]
pub struct SimExecutor {
    config: SimConfig,
    model: Model,
    contract: Contract,
    /// Per block and offset; `None` was never written.
    cells: Vec<Option<Cell>>,
    /// The same of the pool of layers with a sliding window: what is read in both must be equal.
    local_cells: Vec<Option<Cell>>,
    slots: Vec<Option<SlotState>>,
    queues: [VecDeque<Queued>; 2],
    completed: u64,
    /// Misuse that had no return value to report it.
    misused: Option<ExecutorError>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Cell {
    token: TokenId,
    digest: u64,
}

#[derive(Debug)]
struct SlotState {
    bind: Bind,
    last: TokenId,
}

#[derive(Debug)]
struct Queued {
    ticket: Ticket,
    batch: Batch,
    /// Absent until they come, if some are awaited.
    masks: Option<Vec<TokenMask>>,
    ready_at: Instant,
}

impl SimExecutor {
    /// An executor with an unwritten pool.
    pub fn new(config: SimConfig) -> Self {
        let capacity = &config.capacity;
        let unwritten = |blocks: u32| vec![None; blocks as usize * capacity.block_size as usize];
        Self {
            model: model(&config),
            contract: Contract::new(capacity.clone()),
            cells: unwritten(capacity.blocks),
            local_cells: unwritten(capacity.local.map_or(0, |local| local.blocks)),
            slots: (0..capacity.slots).map(|_| None).collect(),
            queues: Default::default(),
            completed: 0,
            misused: None,
            config,
        }
    }

    /// What sequence `index` of `request` gives when it runs alone and undisturbed, in a context of
    /// `max_len` tokens.
    pub fn reference(
        config: &SimConfig,
        request: &GenerationRequest,
        index: u32,
        max_len: u32,
    ) -> (Vec<TokenId>, FinishReason) {
        let model = model(config);
        let seed = request.sampling.seed.wrapping_add(u64::from(index));
        let mut history = model.start();
        let mut failed = false;
        let mut read = |token: TokenId| {
            history = model.attend(history, model.digest(history, token));
            failed |= config.fail_token == Some(token);
            (history, failed)
        };
        let mut state = None;
        for &token in request.prompt.iter() {
            state = Some(read(token));
        }
        let mut output = Vec::new();
        let mut position = request.prompt.len() as u32;
        while let Some((history, failed)) = state {
            if failed {
                return (output, FinishReason::Error);
            }
            let nth = output.len() as u32;
            let token = model
                .sample(history, &request.sampling, seed, position, nth, None)
                .token;
            output.push(token);
            position += 1;
            if request.stop.eos_ids.contains(&token) {
                return (output, FinishReason::Stop(None));
            }
            if request.stop.token_ids.contains(&token) {
                return (output, FinishReason::Stop(Some(token)));
            }
            if nth + 1 == request.stop.max_tokens || position == max_len {
                break;
            }
            state = Some(read(token));
        }
        (output, FinishReason::Length)
    }

    /// Refuses what is allowed for each batch alone but unsafe next to what else is running: a row
    /// must not write what another row of the batch, or anything on the other lane, reads or writes.
    fn check_hazards(&self, lane: Lane, batch: &Batch) -> Result<(), ExecutorError> {
        let capacity = &self.config.capacity;
        let race = |block: &Block, with: &str| {
            let (pool, block) = (block.0, block.1.0);
            Err(ExecutorError::Rejected(format!(
                "{pool} block {block} is written next to {with}"
            )))
        };
        for (i, row) in batch.rows.iter().enumerate() {
            let others = batch.rows.iter().enumerate().filter(|&(j, _)| i != j);
            let touched: HashSet<Block> =
                others.flat_map(|(_, row)| touches(row, capacity)).collect();
            if let Some(block) = writes(row, capacity).find(|block| touched.contains(block)) {
                return race(&block, "another row that reads it");
            }
        }
        let (writes, touches) = footprint(batch, capacity);
        let other = if lane == Lane::Main {
            Lane::Prefill
        } else {
            Lane::Main
        };
        for queued in &self.queues[other as usize] {
            let (other_writes, other_touches) = footprint(&queued.batch, capacity);
            let hit = writes.intersection(&other_touches).next();
            if let Some(block) = hit.or_else(|| touches.intersection(&other_writes).next()) {
                return race(block, "the other lane");
            }
        }
        Ok(())
    }

    /// The lane whose oldest batch is done next.
    fn next_lane(&self) -> Option<Lane> {
        let ready = |lane: Lane| {
            let oldest = self.queues[lane as usize].front()?;
            oldest.masks.is_some().then_some(oldest.ready_at)
        };
        match (ready(Lane::Main), ready(Lane::Prefill)) {
            (None, None) => None,
            (Some(_), None) => Some(Lane::Main),
            (None, Some(_)) => Some(Lane::Prefill),
            (Some(main), Some(prefill)) => {
                let main_first = if self.config.step_time.is_zero() {
                    mix(self.config.seed ^ self.completed).is_multiple_of(2)
                } else {
                    main <= prefill
                };
                Some(if main_first {
                    Lane::Main
                } else {
                    Lane::Prefill
                })
            }
        }
    }

    fn run_batch(
        &mut self,
        batch: &Batch,
        masks: &[TokenMask],
    ) -> Result<Vec<RowOutput>, ExecutorError> {
        let size = self.config.capacity.block_size as usize;
        for (copies, cells) in [
            (&batch.copies, &mut self.cells),
            (&batch.local_copies, &mut self.local_cells),
        ] {
            for copy in copies {
                let src = copy.src.0 as usize * size;
                cells.copy_within(src..src + size, copy.dst.0 as usize * size);
            }
        }
        let mut masks = masks.iter();
        let mut mask_of = |row: &Row| row.masked.then(|| masks.next()).flatten();
        batch
            .rows
            .iter()
            .map(|row| self.run_row(row, mask_of(row)))
            .collect()
    }

    fn run_row(&mut self, row: &Row, mask: Option<&TokenMask>) -> Result<RowOutput, ExecutorError> {
        let slot = &mut self.slots[row.slot.0 as usize];
        if let Some(bind) = &row.bind {
            *slot = Some(SlotState {
                bind: bind.clone(),
                last: 0,
            });
        }
        let SlotState { bind, last } = slot.as_mut().expect("the contract checked the bind");
        let last_token = [*last];
        let input = match &row.input {
            Input::Tokens(tokens) => tokens.as_slice(),
            Input::Last => &last_token,
        };
        let (model, size) = (self.model, self.config.capacity.block_size);
        let at = |block: BlockId, position: u32| {
            block.0 as usize * size as usize + (position % size) as usize
        };
        let cell = |position: u32| at(row.blocks[(position / size) as usize], position);
        let local_cell = |position: u32| {
            let block = row.local.get((position / size) as usize);
            Some(at(block?, position))
        };
        let window = self.config.capacity.local.map_or(0, |local| local.window);
        let seen = (row.start + 1).saturating_sub(window)..row.start;

        let mut output = RowOutput::default();
        let mut history = model.start();
        for position in 0..row.start {
            let read = self.cells[cell(position)].ok_or_else(|| {
                let slot = row.slot.0;
                ExecutorError::Fatal(format!(
                    "slot {slot} reads position {position}: not written"
                ))
            })?;
            if seen.contains(&position) {
                let local = local_cell(position).and_then(|at| self.local_cells[at]);
                if local != Some(read) {
                    let slot = row.slot.0;
                    return Err(ExecutorError::Fatal(format!(
                        "slot {slot} reads position {position}: its local KV is another's"
                    )));
                }
            }
            history = model.attend(history, read.digest);
            output.failed |= self.config.fail_token == Some(read.token);
        }
        for (position, &token) in (row.start..).zip(input) {
            let digest = model.digest(history, token);
            self.cells[cell(position)] = Some(Cell { token, digest });
            if let Some(local) = local_cell(position) {
                self.local_cells[local] = Some(Cell { token, digest });
            }
            history = model.attend(history, digest);
            output.failed |= self.config.fail_token == Some(token);
            if row.prompt_logprobs
                && let Some(&next) = bind.prompt.get(position as usize + 1)
            {
                let top = bind.sampling.prompt_logprobs.unwrap_or(0);
                output
                    .prompt_logprobs
                    .push(model.logprobs(history, next, top));
            }
        }
        if row.sample && !output.failed {
            let nth = row.end().saturating_sub(bind.prompt.len() as u32);
            let (seed, mask) = (bind.seed, mask.map(|mask| &**mask));
            let sampled = model.sample(history, &bind.sampling, seed, row.end(), nth, mask);
            *last = sampled.token;
            output.sampled = Some(sampled);
        }
        Ok(output)
    }
}

impl Executor for SimExecutor {
    fn capacity(&self) -> &Capacity {
        &self.config.capacity
    }

    fn submit(&mut self, lane: Lane, batch: Batch) -> Result<Ticket, ExecutorError> {
        // Hazards are looked for in batches that are sound by themselves.
        self.contract.check(lane, &batch)?;
        self.check_hazards(lane, &batch)?;
        let ticket = self.contract.submit(lane, &batch)?;
        let queue = &mut self.queues[lane as usize];
        let now = Instant::now();
        let begins = queue.back().map_or(now, |queued| queued.ready_at.max(now));
        queue.push_back(Queued {
            ticket,
            masks: (!batch.rows.iter().any(|row| row.masked)).then(Vec::new),
            batch,
            ready_at: begins + self.config.step_time,
        });
        Ok(ticket)
    }

    fn mask(&mut self, ticket: Ticket, masks: Vec<TokenMask>) -> Result<(), ExecutorError> {
        let lane = self.contract.mask(ticket, &masks)?;
        let mut queue = self.queues[lane as usize].iter_mut();
        let queued = queue.find(|queued| queued.ticket == ticket);
        queued.expect("the contract knows it").masks = Some(masks);
        Ok(())
    }

    fn wait(&mut self, deadline: Instant) -> Result<Option<Completion>, ExecutorError> {
        if let Some(error) = &self.misused {
            return Err(error.clone());
        }
        let after = |steps: Option<u64>| steps.is_some_and(|steps| self.completed >= steps);
        if after(self.config.fatal_after) {
            return Err(ExecutorError::Fatal("the simulated device was lost".into()));
        }
        while after(self.config.stuck_after) {
            std::thread::park();
        }
        let Some(lane) = self.next_lane() else {
            // Masks that are not there can't come while this thread is here.
            if self.queues.iter().any(|queue| !queue.is_empty()) {
                std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
            }
            return Ok(None);
        };
        let hangs = after(self.config.hang_after);
        let queue = &mut self.queues[lane as usize];
        let ready_at = queue.front().expect("next_lane saw one").ready_at;
        let until = if hangs {
            deadline
        } else {
            ready_at.min(deadline)
        };
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        if hangs || ready_at > deadline {
            return Ok(None);
        }
        let Queued {
            ticket,
            batch,
            masks,
            ..
        } = queue.pop_front().expect("next_lane saw one");
        let outputs = self.run_batch(&batch, &masks.unwrap_or_default())?;
        self.contract.complete(lane);
        self.completed += 1;
        Ok(Some(Completion {
            ticket,
            outputs,
            busy: self.config.step_time,
        }))
    }

    fn release(&mut self, slot: Slot) {
        match self.contract.release(slot) {
            Ok(()) => self.slots[slot.0 as usize] = None,
            Err(error) => self.misused = Some(ExecutorError::Fatal(error.to_string())),
        }
    }
}

fn model(config: &SimConfig) -> Model {
    Model {
        seed: config.seed,
        vocab_size: config.capacity.vocab_size,
    }
}

/// A block of one of the two pools.
type Block = (&'static str, BlockId);

fn writes(row: &Row, capacity: &Capacity) -> impl Iterator<Item = Block> {
    let size = capacity.block_size;
    both(row.writes(size), row.local_writes(size))
}

fn touches(row: &Row, capacity: &Capacity) -> impl Iterator<Item = Block> {
    let size = capacity.block_size;
    let local = capacity.local.map(|local| row.local_touches(&local, size));
    both(row.touches(size), local.unwrap_or_default())
}

fn both(main: &[BlockId], local: &[BlockId]) -> impl Iterator<Item = Block> {
    let main = main.iter().map(|&block| ("main", block));
    main.chain(local.iter().map(|&block| ("local", block)))
}

/// The blocks that a batch writes, and those that it reads or writes.
fn footprint(batch: &Batch, capacity: &Capacity) -> (HashSet<Block>, HashSet<Block>) {
    let copies = batch.copies.iter().map(|copy| ("main", copy));
    let copies = copies.chain(batch.local_copies.iter().map(|copy| ("local", copy)));
    let copied_to = copies.clone().map(|(pool, copy)| (pool, copy.dst));
    let copied = copies.flat_map(|(pool, copy)| [(pool, copy.src), (pool, copy.dst)]);
    let rows = &batch.rows;
    let written = rows.iter().flat_map(|row| writes(row, capacity));
    let touched = rows.iter().flat_map(|row| touches(row, capacity));
    (
        written.chain(copied_to).collect(),
        touched.chain(copied).collect(),
    )
}
