//! Sequences, run step by step on an executor.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use spate_cuda::{CudaConfig, CudaError, CudaExecutor, KvDtype, Overlap};
use spate_executor::{Batch, Bind, Completion, Executor, Input, Lane, Row, Ticket};
use spate_model::Checkpoint;
use spate_types::{BlockId, BlockIds, LocalBlocks, SampledToken, SamplingParams, Slot, TokenId};

/// Positions in a block.
pub(crate) const BLOCK: u32 = 16;

/// What an executor is loaded with.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) slots: u32,
    pub(crate) max_batch_tokens: u32,
    pub(crate) max_seq_len: u32,
    pub(crate) kv_cache_bytes: Option<u64>,
    pub(crate) overlap: Overlap,
    pub(crate) graphs: bool,
}

pub(crate) fn load(model: &dyn Checkpoint, load: Load) -> Result<CudaExecutor, CudaError> {
    let config = CudaConfig {
        device: 0,
        block_size: BLOCK,
        kv_cache_bytes: load.kv_cache_bytes,
        kv_dtype: KvDtype::Bf16,
        memory_utilization: 0.9,
        max_seq_len: load.max_seq_len,
        slots: load.slots,
        max_batch_tokens: load.max_batch_tokens,
        overlap: load.overlap,
        graphs: load.graphs,
    };
    CudaExecutor::load(model, &config, &mut |_| {})
}

/// A sequence in its slot.
pub(crate) struct Sequence {
    pub(crate) slot: Slot,
    bind: Option<Bind>,
    prompt: Arc<[TokenId]>,
    blocks: BlockIds,
    local: LocalBlocks,
    /// Positions submitted.
    pub(crate) len: u32,
    pub(crate) output: Vec<SampledToken>,
    pub(crate) failed: bool,
}

impl Sequence {
    pub(crate) fn prompt_len(&self) -> u32 {
        self.prompt.len() as u32
    }

    /// The next `tokens` of its prompt, which may sample the first token.
    pub(crate) fn prompt_row(&mut self, tokens: u32) -> Row {
        let end = (self.len + tokens).min(self.prompt_len());
        let input = self.prompt[self.len as usize..end as usize].to_vec();
        let sample = end == self.prompt_len();
        self.row(Input::Tokens(input), sample)
    }

    pub(crate) fn decode_row(&mut self) -> Row {
        self.row(Input::Last, true)
    }

    fn row(&mut self, input: Input, sample: bool) -> Row {
        let row = Row {
            slot: self.slot,
            bind: self.bind.take(),
            start: self.len,
            input,
            blocks: self.blocks.clone(),
            local: self.local.clone(),
            sample,
            masked: false,
            prompt_logprobs: false,
        };
        self.len = row.end();
        row
    }
}

/// An executor and its sequences.
pub(crate) struct Rig {
    pub(crate) executor: CudaExecutor,
    pub(crate) sequences: Vec<Sequence>,
    in_flight: VecDeque<(Ticket, Lane, Vec<usize>)>,
}

impl Rig {
    pub(crate) fn new(executor: CudaExecutor) -> Self {
        Self {
            executor,
            sequences: Vec::new(),
            in_flight: VecDeque::new(),
        }
    }

    /// A new sequence in the next slot, with blocks for `room` positions.
    pub(crate) fn add(
        &mut self,
        prompt: Vec<TokenId>,
        sampling: SamplingParams,
        room: u32,
    ) -> usize {
        let index = self.sequences.len();
        let first = self.sequences.iter().map(|s| s.blocks.len() as u32).sum();
        let blocks: BlockIds =
            Arc::new((first..first + room.div_ceil(BLOCK)).map(BlockId).collect());
        let local = match self.executor.capacity().local {
            Some(_) => LocalBlocks {
                first: 0,
                blocks: blocks.clone(),
            },
            None => LocalBlocks::default(),
        };
        let prompt: Arc<[TokenId]> = prompt.into();
        self.sequences.push(Sequence {
            slot: Slot(index as u32),
            bind: Some(Bind {
                prompt: prompt.clone(),
                sampling: Arc::new(sampling),
                seed: 100 + index as u64,
            }),
            prompt,
            blocks,
            local,
            len: 0,
            output: Vec::new(),
            failed: false,
        });
        index
    }

    pub(crate) fn in_flight(&self, lane: Lane) -> usize {
        self.in_flight.iter().filter(|step| step.1 == lane).count()
    }

    /// Submits a step of which the rows' sequences are given; says how long that took the host.
    pub(crate) fn submit(
        &mut self,
        lane: Lane,
        which: Vec<usize>,
        rows: Vec<Row>,
    ) -> Result<Duration> {
        let batch = Batch {
            rows,
            ..Batch::default()
        };
        let start = Instant::now();
        let ticket = self.executor.submit(lane, batch)?;
        let took = start.elapsed();
        self.in_flight.push_back((ticket, lane, which));
        Ok(took)
    }

    /// One token of each of some sequences.
    pub(crate) fn decode(&mut self, which: &[usize]) -> Result<Duration> {
        self.decode_on(Lane::Main, which)
    }

    pub(crate) fn decode_on(&mut self, lane: Lane, which: &[usize]) -> Result<Duration> {
        let rows = which.iter().map(|&i| self.sequences[i].decode_row());
        let rows = rows.collect();
        self.submit(lane, which.to_vec(), rows)
    }

    /// Waits for a step, keeps its outputs, and says on which lane it was.
    pub(crate) fn wait(&mut self) -> Result<(Lane, Completion)> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let done = self.executor.wait(deadline)?.context("a step hangs")?;
        let at = self.in_flight.iter().position(|step| step.0 == done.ticket);
        let step = at.and_then(|at| self.in_flight.remove(at));
        let (_, lane, which) = step.context("a step that is not in flight")?;
        ensure!(done.outputs.len() == which.len(), "one output per row");
        for (i, output) in which.into_iter().zip(&done.outputs) {
            let sequence = &mut self.sequences[i];
            sequence.failed |= output.failed;
            sequence.output.extend(output.sampled.clone());
        }
        Ok((lane, done))
    }

    /// Computes the prompts of all sequences that are not past them, in steps of at most `budget` tokens.
    pub(crate) fn prefill(&mut self, budget: u32) -> Result<()> {
        loop {
            let (mut which, mut rows, mut left) = (Vec::new(), Vec::new(), budget);
            for (i, sequence) in self.sequences.iter_mut().enumerate() {
                let tokens = sequence.prompt_len().saturating_sub(sequence.len).min(left);
                if tokens > 0 {
                    rows.push(sequence.prompt_row(tokens));
                    which.push(i);
                    left -= tokens;
                }
            }
            if rows.is_empty() {
                return Ok(());
            }
            self.submit(Lane::Main, which, rows)?;
            self.wait()?;
        }
    }

    /// Forgets the sequences.
    pub(crate) fn clear(&mut self) {
        self.truncate(0);
    }

    /// Forgets all but the first sequences.
    pub(crate) fn truncate(&mut self, len: usize) {
        for sequence in self.sequences.drain(len..) {
            self.executor.release(sequence.slot);
        }
    }
}

/// Tokens below `vocab` that differ from seed to seed (Knuth's multiplicative hashing).
pub(crate) fn tokens(seed: u32, len: u32, vocab: u32) -> Vec<TokenId> {
    let token = |i: u32| (seed.wrapping_mul(97) + i + 1).wrapping_mul(2_654_435_761) % vocab;
    (0..len).map(token).collect()
}
