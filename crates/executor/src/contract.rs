use std::collections::{HashSet, VecDeque};

use spate_types::{BlockId, Slot, TokenId};

use crate::{
    Batch, Bind, BlockCopy, Capacity, ExecutorError, Input, Lane, LocalKv, Row, Ticket, TokenMask,
};

/// Checks batches against the rules of the contract, in order of submission. Implementations keep
/// one, so that all of them refuse the same things with the same words.
#[derive(Debug)]
pub struct Contract {
    capacity: Capacity,
    slots: Vec<SlotState>,
    /// Batches in flight, oldest first, per lane.
    in_flight: [VecDeque<InFlight>; 2],
    submitted: u64,
}

#[derive(Debug)]
struct InFlight {
    ticket: Ticket,
    slots: Vec<Slot>,
    /// Masks that it waits for.
    masks: usize,
}

/// What submission order says about a slot.
#[derive(Debug, Clone, Copy, Default)]
struct SlotState {
    bound: bool,
    /// A row that samples was submitted since the bind.
    sampled: bool,
    in_flight: u32,
    lane: Option<Lane>,
}

impl Contract {
    /// Nothing bound, nothing in flight.
    pub fn new(capacity: Capacity) -> Self {
        let slots = vec![SlotState::default(); capacity.slots as usize];
        Self {
            capacity,
            slots,
            in_flight: Default::default(),
            submitted: 0,
        }
    }

    /// The capacity it checks against.
    pub fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    /// Checks `batch` without accepting it.
    ///
    /// # Errors
    /// [`ExecutorError::Rejected`] if it breaks a rule.
    pub fn check(&self, lane: Lane, batch: &Batch) -> Result<(), ExecutorError> {
        self.check_batch(lane, batch)
            .map_err(ExecutorError::Rejected)
    }

    /// Accepts `batch` as submitted on `lane`, and names it.
    ///
    /// # Errors
    /// [`ExecutorError::Rejected`] if it breaks a rule; then nothing is changed.
    pub fn submit(&mut self, lane: Lane, batch: &Batch) -> Result<Ticket, ExecutorError> {
        self.check(lane, batch)?;
        for row in &batch.rows {
            let state = &mut self.slots[row.slot.0 as usize];
            state.bound = true;
            state.sampled = row.sample || (state.sampled && row.bind.is_none());
            state.in_flight += 1;
            state.lane = Some(lane);
        }
        let ticket = Ticket(self.submitted);
        self.submitted += 1;
        self.in_flight[lane as usize].push_back(InFlight {
            ticket,
            slots: batch.rows.iter().map(|row| row.slot).collect(),
            masks: batch.rows.iter().filter(|row| row.masked).count(),
        });
        Ok(ticket)
    }

    /// Accepts the masks of a batch; says on which lane that is.
    ///
    /// # Errors
    /// [`ExecutorError::Rejected`] if they break a rule; then nothing is changed.
    pub fn mask(&mut self, ticket: Ticket, masks: &[TokenMask]) -> Result<Lane, ExecutorError> {
        let vocab = self.capacity.vocab_size;
        for lane in [Lane::Main, Lane::Prefill] {
            let mut batches = self.in_flight[lane as usize].iter_mut();
            let Some(batch) = batches.find(|batch| batch.ticket == ticket) else {
                continue;
            };
            let refused = match masks.iter().find_map(|mask| check_mask(mask, vocab).err()) {
                None if masks.is_empty() || masks.len() != batch.masks => format!(
                    "{} masks for a batch that waits for {}",
                    masks.len(),
                    batch.masks
                ),
                None => {
                    batch.masks = 0;
                    return Ok(lane);
                }
                Some(what) => what,
            };
            return Err(ExecutorError::Rejected(refused));
        }
        let what = format!("masks for {ticket:?}, which is not in flight");
        Err(ExecutorError::Rejected(what))
    }

    /// The oldest batch of `lane` is done.
    ///
    /// # Panics
    /// If none is in flight.
    pub fn complete(&mut self, lane: Lane) {
        let batch = self.in_flight[lane as usize]
            .pop_front()
            .expect("a batch is in flight");
        for slot in batch.slots {
            self.slots[slot.0 as usize].in_flight -= 1;
        }
    }

    /// Forgets a slot.
    ///
    /// # Errors
    /// [`ExecutorError::Rejected`] if there is no such slot or a batch in flight names it.
    pub fn release(&mut self, slot: Slot) -> Result<(), ExecutorError> {
        let state = self.slots.get_mut(slot.0 as usize);
        match state.filter(|state| state.in_flight == 0) {
            Some(state) => *state = SlotState::default(),
            None => {
                let what = format!("release of slot {}, which is unknown or in flight", slot.0);
                return Err(ExecutorError::Rejected(what));
            }
        }
        Ok(())
    }

    fn check_batch(&self, lane: Lane, batch: &Batch) -> Result<(), String> {
        let capacity = &self.capacity;
        if !capacity.lanes.contains(&lane) {
            return Err(format!("there is no lane {lane:?}"));
        }
        if self.in_flight[lane as usize].len() >= capacity.depth as usize {
            return Err(format!(
                "{} batches are in flight on {lane:?} already",
                capacity.depth
            ));
        }
        if batch.rows.is_empty() {
            return Err("it has no rows".into());
        }
        let tokens: usize = batch.rows.iter().map(|row| row.input.len()).sum();
        if tokens > capacity.max_batch_tokens as usize {
            return Err(format!(
                "{tokens} input tokens, most {}",
                capacity.max_batch_tokens
            ));
        }
        check_copies(&batch.copies, capacity.blocks)?;
        let local_blocks = capacity.local.map_or(0, |local| local.blocks);
        check_copies(&batch.local_copies, local_blocks).map_err(|what| format!("local {what}"))?;
        for row in &batch.rows {
            self.check_row(lane, row)
                .map_err(|what| format!("slot {}: {what}", row.slot.0))?;
        }
        let (rows, size) = (&batch.rows, capacity.block_size);
        if let Some(slot) = repeated(rows.iter().map(|row| row.slot)) {
            return Err(format!("slot {} has two rows", slot.0));
        }
        if let Some(block) = repeated(rows.iter().flat_map(|row| row.writes(size)).copied()) {
            return Err(format!("block {} is written twice", block.0));
        }
        let local = rows.iter().flat_map(|row| row.local_writes(size));
        if let Some(block) = repeated(local.copied()) {
            return Err(format!("local block {} is written twice", block.0));
        }
        Ok(())
    }

    fn check_row(&self, lane: Lane, row: &Row) -> Result<(), String> {
        let state = self
            .slots
            .get(row.slot.0 as usize)
            .ok_or("there is no such slot")?;
        if state.in_flight > 0 && state.lane != Some(lane) {
            return Err("it is in flight on another lane".into());
        }
        match &row.bind {
            Some(bind) => self.check_bind(bind)?,
            None if !state.bound => return Err("its first row has no bind".into()),
            None => {}
        }
        match &row.input {
            Input::Tokens(tokens) if tokens.is_empty() => return Err("no input".into()),
            Input::Tokens(tokens) => self.check_ids(tokens)?,
            Input::Last if row.bind.is_some() || !state.sampled => {
                return Err("no token was sampled for it yet".into());
            }
            Input::Last => {}
        }
        if row.masked && !row.sample {
            return Err("a mask for a row that does not sample".into());
        }
        let end = u64::from(row.start) + row.input.len() as u64;
        if end > u64::from(self.capacity.max_seq_len) {
            return Err(format!(
                "position {end} is past {}",
                self.capacity.max_seq_len
            ));
        }
        if end > row.blocks.len() as u64 * u64::from(self.capacity.block_size) {
            return Err(format!("its blocks do not cover {end} positions"));
        }
        if let Some(&last) = row.blocks.iter().max() {
            check_block(last, self.capacity.blocks)?;
        }
        self.check_local(row)
    }

    fn check_local(&self, row: &Row) -> Result<(), String> {
        let Some(local) = self.capacity.local else {
            let none = row.local.blocks.is_empty();
            return none
                .then_some(())
                .ok_or("there is no pool of local blocks".into());
        };
        let size = self.capacity.block_size;
        let first = local.first_seen(row.start, size);
        if row.local.first > first || row.local.end() < row.end().div_ceil(size) as usize {
            return Err(format!(
                "its local blocks do not cover positions {} to {}",
                first * size,
                row.end()
            ));
        }
        let blocks = row.local.blocks.iter();
        blocks
            .copied()
            .try_for_each(|block| check_block(block, local.blocks))
            .map_err(|what| format!("local: {what}"))
    }

    fn check_bind(&self, bind: &Bind) -> Result<(), String> {
        if bind.prompt.is_empty() || bind.prompt.len() > self.capacity.max_seq_len as usize {
            return Err(format!("a prompt of {} tokens", bind.prompt.len()));
        }
        self.check_ids(&bind.prompt)?;
        self.check_ids(&bind.sampling.min_tokens_banned)?;
        bind.sampling
            .logit_bias
            .iter()
            .try_for_each(|&(id, _)| self.check_ids(&[id]))
    }

    fn check_ids(&self, ids: &[TokenId]) -> Result<(), String> {
        match ids.iter().find(|&&id| id >= self.capacity.vocab_size) {
            Some(id) => Err(format!("token {id} is not in the vocabulary")),
            None => Ok(()),
        }
    }
}

/// Something that comes more than once. Sorting is quicker than a set: this runs for every step.
fn repeated<T: Ord + Copy>(items: impl Iterator<Item = T>) -> Option<T> {
    let mut items: Vec<T> = items.collect();
    items.sort_unstable();
    let pair = items.windows(2).find(|pair| pair[0] == pair[1])?;
    Some(pair[0])
}

fn check_mask(mask: &[u32], vocab: u32) -> Result<(), String> {
    let words = vocab.div_ceil(32) as usize;
    if mask.len() != words {
        return Err(format!(
            "a mask of {} words, {words} are needed",
            mask.len()
        ));
    }
    let beyond = 32 * words as u32 - vocab;
    let (last, others) = mask.split_last().expect("a vocabulary is not empty");
    match others.iter().any(|&word| word != 0) || last << beyond != 0 {
        true => Ok(()),
        false => Err("a mask that allows no token".into()),
    }
}

/// Copies within a pool of `blocks` blocks.
fn check_copies(copies: &[BlockCopy], blocks: u32) -> Result<(), String> {
    let sources: HashSet<BlockId> = copies.iter().map(|copy| copy.src).collect();
    let mut targets = HashSet::new();
    for copy in copies {
        check_block(copy.src, blocks)?;
        check_block(copy.dst, blocks)?;
        if sources.contains(&copy.dst) || !targets.insert(copy.dst) {
            return Err(format!(
                "block {} is copied to twice, or from and to",
                copy.dst.0
            ));
        }
    }
    Ok(())
}

fn check_block(block: BlockId, blocks: u32) -> Result<(), String> {
    if block.0 < blocks {
        Ok(())
    } else {
        Err(format!("there is no block {}", block.0))
    }
}

impl Row {
    /// The blocks that its input positions fall into. The row's blocks must cover them.
    pub fn writes(&self, block_size: u32) -> &[BlockId] {
        &self.blocks[(self.start / block_size) as usize..self.end().div_ceil(block_size) as usize]
    }

    /// The local blocks that its input positions fall into; none if it has none.
    pub fn local_writes(&self, block_size: u32) -> &[BlockId] {
        self.local_range(self.start / block_size, block_size)
    }

    /// The local blocks that it reads or writes; none if it has none.
    pub fn local_touches(&self, local: &LocalKv, block_size: u32) -> &[BlockId] {
        self.local_range(local.first_seen(self.start, block_size), block_size)
    }

    /// Local blocks from block `first` of the sequence to its last input position.
    fn local_range(&self, first: u32, block_size: u32) -> &[BlockId] {
        if self.local.blocks.is_empty() {
            return &[];
        }
        let before = self.local.first;
        let end = self.end().div_ceil(block_size);
        &self.local.blocks[(first - before) as usize..(end - before) as usize]
    }

    /// The blocks that it reads or writes. The row's blocks must cover them.
    pub fn touches(&self, block_size: u32) -> &[BlockId] {
        &self.blocks[..self.end().div_ceil(block_size) as usize]
    }
}
