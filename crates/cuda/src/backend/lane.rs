use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spate_executor::{Batch, Completion, Input, RowOutput, Ticket, TokenMask};
use spate_model::{Transformer, Weights};
use spate_types::{SampledToken, Slot};

use super::graphs::{self, Bucket, Way};
use super::loader::Matrix;
use super::ops::{CudaOps, Shared};
use super::ring::{Outcome, Ring};
use super::slots::{QueuedBind, Slots};
use super::step::{Describe, HostStep, LocalTables, Outputs, Step};
use crate::CudaError;
use crate::driver::{Device, Graph, Slice, Stream};
use crate::kernels::{Done, MAX_TOP, NONE, RING, Want};

/// Batches that may be submitted on a lane and not yet be completed.
pub(crate) const DEPTH: usize = RING;

/// What the completion of steps without rows is known by. No step has this ticket.
const PADDING: u64 = u64::MAX;

/// A queue of steps with everything that a step needs for itself: a stream, activations, the way of
/// its description to the GPU and of its results back, graphs.
///
/// A step is one graph launch if its rows all decode and sample; two, and some copies, if it has prompts
/// and not very many tokens; else its kernels are launched one by one. All run the same kernels in the
/// same order.
pub(crate) struct Lane {
    ops: CudaOps,
    transformer: Transformer<CudaOps>,
    step: HostStep,
    ring: Ring,
    max_works: usize,
    /// Decode steps by rows, ascending; those for the whole GPU, then those for a part.
    decodes: Vec<Bucket>,
    /// Other steps up to the hidden states, by tokens, ascending.
    hidden: Vec<Bucket>,
    /// From there on, by rows, ascending.
    outputs: Vec<Bucket>,
    /// What the graphs for a part of the GPU were captured on; it keeps the part.
    beside: Option<Arc<Stream>>,
    in_flight: VecDeque<InFlight>,
    /// When the last completion was seen.
    completed: Instant,
    /// When that step ran, in nanoseconds of the device's clock.
    last: Range<u64>,
}

struct InFlight {
    ticket: Ticket,
    buffer: usize,
    rows: Vec<Slot>,
    wants: Vec<Want>,
    /// Whether it waits for masks.
    masked: bool,
    way: Way,
    submitted: Instant,
}

impl Lane {
    /// `packed`: device memory for a step's description.
    pub(crate) fn new(
        device: &Device,
        mut ops: CudaOps,
        weights: Weights<Matrix, Slice<f32>>,
        packed: Slice<u8>,
        max_works: usize,
    ) -> Result<Self, CudaError> {
        let config = ops.shared.config.clone();
        let transformer = Transformer::new(config, weights, &mut ops)?;
        let most = Outcome {
            failed: ops.failed,
            chosen: ops.chosen,
            tops: ops.tops,
        };
        ops.stream.synchronize()?;
        Ok(Self {
            ring: Ring::new(device, packed, ops.turn, &most)?,
            ops,
            transformer,
            step: HostStep::default(),
            max_works,
            decodes: Vec::new(),
            hidden: Vec::new(),
            outputs: Vec::new(),
            beside: None,
            in_flight: VecDeque::new(),
            completed: Instant::now(),
            last: 0..0,
        })
    }

    /// Captures graphs of steps with up to so many rows.
    pub(crate) fn capture(&mut self, slots: &Slots, most: usize) -> Result<(), CudaError> {
        // What prompts read of a cache of codes is unpacked before, block by block as they need it.
        let mixed = self.ops.shared.pools.unpacked_blocks().is_none();
        // Once for real: what a kernel needs at its first launch can't be had while capturing.
        let mut step = self.padding(slots, |step, d| match mixed {
            true => step.pad_mixed(most, most, d),
            false => step.pad_decode(most, d),
        })?;
        self.queue(&mut step, &[], slots)?;
        self.ops.stream.synchronize()?;
        let buffer = self.ring.advance();
        if self.ring.done(buffer, PADDING).is_none() {
            let what = "a step without rows gave no result";
            return Err(CudaError::Config(what.into()));
        }
        if mixed {
            self.capture_mixed(slots, most)?;
        }
        self.capture_on(None, slots, most)
    }

    fn capture_mixed(&mut self, slots: &Slots, most: usize) -> Result<(), CudaError> {
        let stream = Arc::clone(&self.ops.stream);
        for tokens in graphs::token_sizes(self.ops.shared.max_tokens) {
            let step = self.padding(slots, |step, d| step.pad_mixed(tokens, most, d))?;
            let graph = Graph::capture(&stream, || self.queue_hidden(&step))?;
            graph.upload(&stream)?;
            let bucket = Bucket::new(tokens, false, graph, step.inputs);
            self.hidden.push(bucket);
        }
        for rows in graphs::sizes(most) {
            let mut step = self.padding(slots, |step, d| step.pad_mixed(most, most, d))?;
            step.limit(Outputs::of_rows(rows));
            let graph = Graph::capture(&stream, || self.queue_outputs(&mut step))?;
            graph.upload(&stream)?;
            let bucket = Bucket::new(rows, false, graph, step.outputs);
            self.outputs.push(bucket);
        }
        stream.synchronize()
    }

    /// The same for steps that run beside others, on the part of the GPU that a stream is bound to.
    pub(crate) fn capture_beside(
        &mut self,
        part: Stream,
        slots: &Slots,
        most: usize,
    ) -> Result<(), CudaError> {
        self.capture_on(Some(Arc::new(part)), slots, most)
    }

    fn capture_on(
        &mut self,
        part: Option<Arc<Stream>>,
        slots: &Slots,
        most: usize,
    ) -> Result<(), CudaError> {
        let (beside, whole) = (part.is_some(), Arc::clone(&self.ops.stream));
        let stream = part.unwrap_or_else(|| Arc::clone(&whole));
        self.ops.stream = Arc::clone(&stream);
        for rows in graphs::sizes(most) {
            let mut step = self.padding(slots, |step, d| step.pad_decode(rows, d))?;
            let graph = Graph::capture(&stream, || self.queue(&mut step, &[], slots))?;
            graph.upload(&whole)?;
            let bucket = Bucket::new(rows, beside, graph, step.packed);
            self.decodes.push(bucket);
        }
        self.ops.stream = Arc::clone(&whole);
        if beside {
            self.beside = Some(stream);
        }
        whole.synchronize()
    }

    /// A step of nothing but padding.
    fn padding(
        &mut self,
        slots: &Slots,
        pad: impl Fn(&mut HostStep, &Describe),
    ) -> Result<Step, CudaError> {
        let shared = Arc::clone(&self.ops.shared);
        self.step.clear();
        self.step.ticket = PADDING;
        pad(&mut self.step, &describe(&shared, slots, self.max_works));
        let packer = self.ring.packer();
        packer.clear();
        self.step.pack(packer, slots.tables)
    }

    /// Whether steps are in flight.
    pub(crate) fn is_busy(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Queues a step. `beside`: another lane is busy.
    pub(crate) fn submit(
        &mut self,
        ticket: Ticket,
        batch: &Batch,
        slots: &mut Slots,
        beside: bool,
    ) -> Result<(), CudaError> {
        let shared = Arc::clone(&self.ops.shared);
        let describe = describe(&shared, slots, self.max_works);
        let binds = || {
            batch
                .rows
                .iter()
                .filter_map(|row| Some((row.slot, row.bind.as_ref()?)))
        };
        for (slot, bind) in binds() {
            slots.note(slot, bind);
        }
        self.step.fill(ticket, batch, slots, &describe);
        let way = self.way(batch, beside && self.beside.is_some(), &describe);
        let outputs = self.pad(way, &describe);
        let packer = self.ring.packer();
        packer.clear();
        let mut step = self.step.pack(packer, slots.tables)?;
        let stream = Arc::clone(&self.ops.stream);
        // SAFETY (of the graphs): they touch what all steps of this lane touch.
        match way {
            // SAFETY: see above.
            Way::Whole(at) => unsafe { self.decodes[at].launch(&stream, step.packed)? },
            Way::Parts {
                hidden,
                outputs: rest,
            } => {
                let binds = Slots::pack_binds(packer, binds())?;
                step.packed = packer.packed();
                self.queue_start(&step, &binds, slots)?;
                match hidden {
                    // SAFETY: see above.
                    Some(at) => unsafe { self.hidden[at].launch(&stream, step.inputs)? },
                    None => self.queue_hidden(&step)?,
                }
                step.limit(outputs);
                match rest {
                    // SAFETY: see above.
                    Some(at) => unsafe { self.outputs[at].launch(&stream, step.outputs)? },
                    None => self.queue_outputs(&mut step)?,
                }
            }
        }
        self.in_flight.push_back(InFlight {
            ticket,
            buffer: self.ring.advance(),
            rows: batch.rows.iter().map(|row| row.slot).collect(),
            wants: self.step.wants[..outputs.wants].to_vec(),
            masked: batch.rows.iter().any(|row| row.masked),
            way,
            submitted: Instant::now(),
        });
        Ok(())
    }

    /// How the described step is queued. `beside`: on a part of the GPU.
    fn way(&self, batch: &Batch, beside: bool, describe: &Describe) -> Way {
        let at_least = |buckets: &[Bucket], beside: bool, size: usize| {
            let fits = |b: &Bucket| b.beside == beside && b.size >= size;
            buckets.iter().position(fits)
        };
        let whole = at_least(&self.decodes, beside, batch.rows.len());
        let plain = batch.rows.iter().all(|row| {
            row.input == Input::Last && row.sample && row.bind.is_none() && !row.prompt_logprobs
        });
        if let Some(at) = whole.filter(|_| plain)
            && self.step.fits_decode(self.decodes[at].size)
        {
            return Way::Whole(at);
        }
        let fits = |at: &usize| {
            let tokens = self.hidden[*at].size;
            self.step.fits_mixed(tokens, self.most_rows(), describe)
        };
        let hidden = at_least(&self.hidden, beside, self.step.tokens()).filter(fits);
        let Outputs { rows, wants } = self.step.outputs();
        Way::Parts {
            hidden,
            // Without logits it is two kernels.
            outputs: match hidden.is_some() && wants > 0 {
                true => at_least(&self.outputs, beside, rows.max(wants)),
                false => None,
            },
        }
    }

    /// Pads the described step for its way; says what comes out of it then.
    fn pad(&mut self, way: Way, describe: &Describe) -> Outputs {
        match way {
            Way::Whole(at) => self.step.pad_decode(self.decodes[at].size, describe),
            Way::Parts { hidden: None, .. } => {}
            Way::Parts {
                hidden: Some(at),
                outputs,
            } => {
                let unpadded = self.step.outputs();
                let tokens = self.hidden[at].size;
                self.step.pad_mixed(tokens, self.most_rows(), describe);
                return outputs.map_or(unpadded, |at| Outputs::of_rows(self.outputs[at].size));
            }
        }
        self.step.outputs()
    }

    /// Rows that mixed steps are padded to.
    fn most_rows(&self) -> usize {
        self.outputs.last().map_or(0, |bucket| bucket.size)
    }

    /// Queues a step's kernels.
    fn queue(
        &mut self,
        step: &mut Step,
        binds: &[QueuedBind],
        slots: &Slots,
    ) -> Result<(), CudaError> {
        self.queue_start(step, binds, slots)?;
        self.queue_hidden(step)?;
        self.queue_outputs(step)
    }

    /// What comes before the rows.
    fn queue_start(
        &mut self,
        step: &Step,
        binds: &[QueuedBind],
        slots: &Slots,
    ) -> Result<(), CudaError> {
        let shared = Arc::clone(&self.ops.shared);
        let (stream, kernels) = (Arc::clone(&self.ops.stream), &shared.kernels);
        // SAFETY: the step that used these buffers has completed, and they are not used again before
        // this one has. A slot is bound anew only when nothing in flight names it.
        unsafe {
            self.ring.fetch(&stream, &kernels.step_io, step.packed)?;
            for bind in binds {
                slots.bind(&stream, &kernels.sample, bind, self.ops.prompt)?;
            }
        }
        self.ops.begin(step, slots.tables)
    }

    /// All tokens' way through the layers.
    fn queue_hidden(&mut self, step: &Step) -> Result<(), CudaError> {
        let layers = 0..self.transformer.config().layers;
        self.transformer.hidden(&mut self.ops, step, layers)
    }

    /// Logits, samples and the results' way back.
    fn queue_outputs(&mut self, step: &mut Step) -> Result<(), CudaError> {
        self.transformer.outputs(&mut self.ops, step)?;
        let (rows, results) = (step.rows.len() / 2, 2 * step.wants.len());
        let outcome = Outcome {
            failed: self.ops.failed.range(0..rows),
            chosen: self.ops.chosen.range(0..results),
            tops: self.ops.tops.range(0..results * MAX_TOP),
        };
        let (stream, shared) = (&self.ops.stream, &self.ops.shared);
        // SAFETY: as in `queue_start`.
        unsafe {
            let io = &shared.kernels.step_io;
            self.ring.deliver(stream, io, step.packed, &outcome)
        }
    }

    /// Gives a step the masks that it waits for.
    pub(crate) fn mask(&mut self, ticket: Ticket, masks: &[TokenMask]) {
        let mut steps = self.in_flight.iter_mut();
        if let Some(step) = steps.find(|step| step.ticket == ticket) {
            step.masked = false;
            self.ops.masks.give(step.buffer, ticket.0 + 1, masks);
        }
    }

    /// The oldest step's results, if it is done.
    pub(crate) fn poll(&mut self) -> Option<Completion> {
        let oldest = self.in_flight.front()?;
        let Done { started, ended, .. } = self.ring.done(oldest.buffer, oldest.ticket.0 + 1)?;
        let done = self.in_flight.pop_front().expect("it has a front");
        let busy = Duration::from_nanos(ended.saturating_sub(started));
        match done.way {
            Way::Whole(at) => self.decodes[at].busy = busy,
            Way::Parts { hidden, .. } => {
                if let Some(at) = hidden {
                    self.hidden[at].busy = busy;
                }
            }
        }
        self.completed = Instant::now();
        self.last = started..ended;
        Some(self.complete(&done, busy))
    }

    /// Whether the device still works.
    pub(crate) fn check(&self) -> Result<(), CudaError> {
        self.ops.stream.is_done().map(|_| ())
    }

    /// When the oldest step will probably be done, if there is one: known for those that ran before.
    pub(crate) fn expected(&self) -> Option<Range<Instant>> {
        let oldest = self.in_flight.front()?;
        let start = oldest.submitted.max(self.completed);
        let busy = match oldest.way {
            Way::Whole(at) => Some(self.decodes[at].busy),
            Way::Parts { hidden, .. } => hidden.map(|at| self.hidden[at].busy),
        };
        Some(match busy {
            Some(busy) => start + busy * 9 / 10..start + busy * 5 / 4 + Duration::from_micros(50),
            None => start..start,
        })
    }

    /// When the last completed step ran, in nanoseconds of the device's clock.
    pub(crate) fn last(&self) -> Range<u64> {
        self.last.clone()
    }

    fn complete(&self, done: &InFlight, busy: Duration) -> Completion {
        let failed = self.ring.failed(done.buffer, done.rows.len());
        let chosen = self.ring.chosen(done.buffer, 2 * done.wants.len());
        let output = |&failed: &u32| RowOutput {
            failed: failed != 0,
            ..RowOutput::default()
        };
        let mut outputs: Vec<RowOutput> = failed.iter().map(output).collect();
        let tile = self.ops.shared.logit_tile;
        for (i, want) in done.wants.iter().enumerate() {
            if want.slot == NONE {
                break; // padding comes last
            }
            // A tile's results: its prompt tokens', then its sampled tokens'.
            let start = i / tile * tile;
            let len = tile.min(done.wants.len() - start);
            let [prompt, sampled] = [start + i, start + len + i];
            let logprobs = |at: usize| chosen[at].logprobs(self.ring.tops(done.buffer, at));
            let output = &mut outputs[want.row as usize];
            if output.failed {
                continue;
            }
            output.prompt_logprobs.extend(logprobs(prompt));
            if let Ok(token) = u32::try_from(chosen[sampled].token) {
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

impl Drop for Lane {
    fn drop(&mut self) {
        // The stream is drained next: nothing on it may wait for masks that never come.
        for step in self.in_flight.iter().filter(|step| step.masked) {
            self.ops.masks.give(step.buffer, step.ticket.0 + 1, &[]);
        }
    }
}

fn describe(shared: &Shared, slots: &Slots, max_works: usize) -> Describe {
    let local = shared.config.local.as_ref();
    let further = match shared.pools.local {
        Some(_) => slots.local_tables(),
        None => 0,
    };
    Describe {
        tiling: shared.pools.main.attention.tiling(),
        max_works,
        block_size: shared.pools.main.shape.block_size,
        unpacked: shared.pools.unpacked_blocks(),
        local: local.map(|local| LocalTables {
            window: local.window as u32,
            further,
        }),
    }
}
