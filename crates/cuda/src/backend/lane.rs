use std::collections::VecDeque;
use std::time::Duration;

use spate_executor::{Batch, Completion, RowOutput, Ticket};
use spate_model::{Transformer, Weights};
use spate_types::{SampledToken, Slot};

use super::loader::Matrix;
use super::ops::CudaOps;
use super::packer::Packer;
use super::slots::Slots;
use super::step::{Describe, HostStep, Step};
use crate::CudaError;
use crate::driver::{Device, Event, Pinned, Slice};
use crate::kernels::{Chosen, MAX_TOP, Top, Want};

/// Batches that may be submitted on a lane and not yet be completed.
pub(crate) const DEPTH: usize = 2;

/// A queue of steps with everything that a step needs for itself: a stream, activations, the way of
/// its description to the GPU and of its results back.
pub(crate) struct Lane {
    ops: CudaOps,
    transformer: Transformer<CudaOps>,
    step: HostStep,
    /// Used in turn.
    buffers: [Buffers; DEPTH],
    next: usize,
    in_flight: VecDeque<InFlight>,
}

/// A step's host memory.
struct Buffers {
    packer: Packer,
    failed: Pinned<u32>,
    chosen: Pinned<Chosen>,
    tops: Pinned<Top>,
    start: Event,
    end: Event,
}

struct InFlight {
    ticket: Ticket,
    buffers: usize,
    rows: Vec<Slot>,
    wants: Vec<Want>,
}

impl Lane {
    /// `packed`: device memory for a step's description.
    pub(crate) fn new(
        device: &Device,
        mut ops: CudaOps,
        weights: Weights<Matrix, Slice<f32>>,
        packed: Slice<u8>,
    ) -> Result<Self, CudaError> {
        let buffers = || {
            let (rows, tokens) = (ops.shared.max_rows, ops.shared.max_tokens);
            Ok::<_, CudaError>(Buffers {
                packer: Packer::new(device, packed)?,
                failed: Pinned::new(device, rows)?,
                chosen: Pinned::new(device, 2 * tokens)?,
                tops: Pinned::new(device, 2 * tokens * MAX_TOP)?,
                start: Event::new(device)?,
                end: Event::new(device)?,
            })
        };
        let buffers = [buffers()?, buffers()?];
        let config = ops.shared.config.clone();
        let transformer = Transformer::new(config, weights, &mut ops)?;
        ops.stream.synchronize()?;
        Ok(Self {
            ops,
            transformer,
            step: HostStep::default(),
            buffers,
            next: 0,
            in_flight: VecDeque::new(),
        })
    }

    /// Queues a step.
    pub(crate) fn submit(
        &mut self,
        ticket: Ticket,
        batch: &Batch,
        slots: &mut Slots,
        max_works: usize,
    ) -> Result<(), CudaError> {
        let index = self.next;
        let buffers = &mut self.buffers[index];
        buffers.packer.clear();
        let mut bound = Vec::new();
        for row in &batch.rows {
            if let Some(bind) = &row.bind {
                let triple = Slots::pack_bind(&mut buffers.packer, row.slot, bind)?;
                bound.push((row.slot, bind, triple));
            }
        }
        let shared = self.ops.shared.clone();
        for (slot, bind, _) in &bound {
            slots.note(*slot, bind);
        }
        self.step
            .fill(batch, slots, shared.pools.main.shape.block_size);
        let local = shared.config.local.as_ref();
        let further = match shared.pools.local {
            Some(_) => slots.local_tables(),
            None => 0,
        };
        let describe = Describe {
            attention: &shared.pools.main.attention,
            max_works,
            tables: slots.tables,
            local: local.map(|local| (local.window as u32, further)),
        };
        let mut step = self.step.pack(&mut buffers.packer, &describe)?;

        let stream = &self.ops.stream;
        stream.record(&buffers.start)?;
        // SAFETY: these buffers' last step has completed, and they are not used again before this one
        // has.
        unsafe { buffers.packer.upload(stream)? };
        for (slot, bind, triple) in bound {
            // SAFETY: a slot is bound anew only when nothing in flight names it.
            unsafe { slots.bind(stream, &shared.kernels.sample, slot, bind, triple)? };
        }
        self.ops.begin(&step, slots.tables)?;
        let layers = 0..self.transformer.config().layers;
        self.transformer.forward(&mut self.ops, &mut step, layers)?;
        self.fetch(index, batch, slots, &step)?;
        self.in_flight.push_back(InFlight {
            ticket,
            buffers: index,
            rows: batch.rows.iter().map(|row| row.slot).collect(),
            wants: self.step.wants.clone(),
        });
        self.next = (index + 1) % DEPTH;
        Ok(())
    }

    /// Queues the results' way back.
    fn fetch(
        &mut self,
        index: usize,
        batch: &Batch,
        slots: &Slots,
        step: &Step,
    ) -> Result<(), CudaError> {
        let (buffers, ops) = (&mut self.buffers[index], &self.ops);
        let (rows, results) = (batch.rows.len(), 2 * step.wants.len());
        let with_tops = batch.rows.iter().any(|row| {
            let p = &slots.get(row.slot).sampling;
            p.logprobs.is_some() || (row.prompt_logprobs && p.prompt_logprobs.is_some())
        });
        let tops = if with_tops { results * MAX_TOP } else { 0 };
        // SAFETY: as for the upload.
        unsafe {
            let stream = &ops.stream;
            stream.download(ops.failed.range(0..rows), &mut buffers.failed[..rows])?;
            stream.download(ops.chosen.range(0..results), &mut buffers.chosen[..results])?;
            stream.download(ops.tops.range(0..tops), &mut buffers.tops[..tops])?;
        }
        ops.stream.record(&buffers.end)
    }

    /// The oldest step's results, if it is done.
    pub(crate) fn poll(&mut self) -> Result<Option<Completion>, CudaError> {
        let Some(oldest) = self.in_flight.front() else {
            return Ok(None);
        };
        if !self.buffers[oldest.buffers].end.is_done()? {
            return Ok(None);
        }
        let done = self.in_flight.pop_front().expect("it has a front");
        let buffers = &self.buffers[done.buffers];
        let busy = buffers.end.since(&buffers.start)?;
        Ok(Some(self.complete(done, busy)))
    }

    fn complete(&self, done: InFlight, busy: Duration) -> Completion {
        let buffers = &self.buffers[done.buffers];
        let mut outputs: Vec<RowOutput> = (0..done.rows.len())
            .map(|row| RowOutput {
                failed: buffers.failed[row] != 0,
                ..RowOutput::default()
            })
            .collect();
        let tile = self.ops.shared.logit_tile;
        for (i, want) in done.wants.iter().enumerate() {
            // A tile's results: its prompt tokens', then its sampled tokens'.
            let start = i / tile * tile;
            let len = tile.min(done.wants.len() - start);
            let [prompt, sampled] = [start + i, start + len + i];
            let logprobs = |at: usize| {
                let tops = &buffers.tops[at * MAX_TOP..][..MAX_TOP];
                buffers.chosen[at].logprobs(tops)
            };
            let output = &mut outputs[want.row as usize];
            if output.failed {
                continue;
            }
            output.prompt_logprobs.extend(logprobs(prompt));
            if let Ok(token) = u32::try_from(buffers.chosen[sampled].token) {
                let logprobs = logprobs(sampled).map(Box::new);
                output.sampled = Some(SampledToken { token, logprobs });
            }
        }
        Completion {
            ticket: done.ticket,
            outputs,
            busy,
        }
    }
}
