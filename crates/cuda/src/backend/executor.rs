use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use half::bf16;
use spate_executor::{
    Batch, Capacity, Completion, Contract, Executor, ExecutorError, Lane as LaneId, Ticket,
    TokenMask,
};
use spate_model::{Checkpoint, ModelConfig, Rope as ModelRope, Weights};
use spate_types::Slot;

use super::kv::{self, KvPlan, KvPools};
use super::lane::{DEPTH, Lane};
use super::loader::{CudaLoader, LOAD_THREADS, WeightFormat, WeightPlan, load_error};
use super::ops::{CudaOps, Kernels, Rates, Shared};
use super::pace::step_tokens;
use super::packer::{self, Packer};
use super::slots::{SlotSizes, Slots};
use crate::CudaError;
use crate::driver::{Arena, Device, Partition, Priority, Stream};
use crate::error::WEIGHTS;
use crate::kernels::{
    AddRmsNorm, Attention, AttentionModel, KvDtype, KvShape, MAX_EDITS, MAX_VOCAB, Path, Rope,
    Sharer, Want, Work,
};

/// Most positions whose logits exist at the same time: they are float32 and as wide as the vocabulary.
const LOGIT_TILE: usize = 256;

/// Memory that is left to the driver: code of kernels, local memory, graphs.
pub(super) const DRIVER_RESERVE: u64 = 512 << 20;

/// How prompts are computed while other sequences decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// In the decodes' steps, in chunks.
    Off,
    /// Long ones on a stream of their own, which may fill the whole GPU. Decodes go first, but a decode
    /// kernel waits for the prompts' kernel that holds the multiprocessors.
    Streams,
    /// As `Streams`, but the GPU is divided: so many multiprocessors (rounded up to what the GPU can divide by)
    /// are the decodes' while a long prompt is computed on the others.
    DecodeSms(u32),
}

/// Settings of the CUDA backend.
#[derive(Debug, Clone)]
pub struct CudaConfig {
    /// Which GPU.
    pub device: u32,
    /// Positions in a KV block; a multiple of 16.
    pub block_size: u32,
    /// Size of the KV pool; `None` takes what [`memory_utilization`](Self::memory_utilization) leaves.
    pub kv_cache_bytes: Option<u64>,
    /// How the KV cache is stored.
    pub kv_dtype: KvDtype,
    /// Share of the GPU's memory to use, in (0, 1].
    pub memory_utilization: f32,
    /// Most positions in one sequence; 0 takes the model's context length.
    pub max_seq_len: u32,
    /// Sequences that can be alive at once.
    pub slots: u32,
    /// Most input tokens in one step.
    pub max_batch_tokens: u32,
    /// Whether prompts and decodes run side by side.
    pub overlap: Overlap,
    /// Whether decode steps are replayed from graphs. Without, they give the same and take longer: that
    /// is for tests and measurements.
    pub graphs: bool,
}

/// Runs a model on one GPU.
///
/// Steps are queued by the thread that submits them; nothing waits but [`Executor::wait`].
pub struct CudaExecutor {
    device: Device,
    contract: Contract,
    budget: Vec<(&'static str, u64)>,
    weight_formats: Vec<WeightFormat>,
    lanes: Vec<(LaneId, Lane)>,
    slots: Slots,
    /// Why no completion will come any more.
    fatal: Option<String>,
    /// Weights, cache and slots; dropped after the lane, which uses them.
    _memory: [Arena; 2],
}

impl CudaExecutor {
    /// Loads a model. Calls `progress` with the share that is done, from 0 to 1.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] when there is no GPU to use; else when the model, the settings or
    /// the GPU's memory don't allow it; the message says which.
    pub fn load(
        checkpoint: &dyn Checkpoint,
        config: &CudaConfig,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self, CudaError> {
        let device = Device::open(config.device)?;
        let path = Path::best(&device);
        Self::load_on(device, path, checkpoint, config, progress)
    }

    /// The same with the kernels that run on every GPU, whatever this one has: to test what other GPUs run.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_portable(
        checkpoint: &dyn Checkpoint,
        config: &CudaConfig,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self, CudaError> {
        let device = Device::open(config.device)?;
        Self::load_on(device, Path::Portable, checkpoint, config, progress)
    }

    fn load_on(
        device: Device,
        path: Path,
        checkpoint: &dyn Checkpoint,
        config: &CudaConfig,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self, CudaError> {
        let model = checkpoint.config()?;
        check_model(&model, config)?;
        let needs = WeightPlan::new(checkpoint, &model, path)?;
        let weights_arena = Arena::new(&device, WEIGHTS, needs.bytes)?;
        let weight_bytes = weights_arena.size();
        let loader = CudaLoader::new(weights_arena)?;
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        let threads = threads.min(LOAD_THREADS);
        let weights = Weights::load(checkpoint, &model, &loader, threads, progress);
        let weights = weights.map_err(load_error)?;
        let weights_arena = loader.finish()?;
        let plan = Plan::new(&device, &model, config, weight_bytes, &needs)?;
        let mut main = Arena::new(&device, "the KV cache and slots", plan.main_bytes())?;
        let pools = KvPools::new(&device, path, &plan.kv, &mut main)?;
        let slots = Slots::new(&mut main, plan.slots)?;
        let stream = Stream::new(&device, Priority::High)?;
        let shared = Arc::new(Shared {
            kernels: Kernels::load(&device, path)?,
            pools,
            slots: slots.memory,
            rotations: plan.rotations(&model, &stream, &mut main)?,
            common_keys: kv::common_keys(
                &model,
                &weights,
                plan.max_seq_len as usize,
                &stream,
                &mut main,
            )?,
            config: model,
            max_tokens: config.max_batch_tokens as usize,
            max_seq_len: plan.max_seq_len as usize,
            max_rows: config.slots as usize,
            logit_tile: plan.logit_tile,
            scratch: needs.scratch,
            gate_up: needs.gate_up,
        });
        let lane_bytes = shared.lane_bytes(plan.max_works);
        let mut lane = |stream| {
            let packed = packer::take(&mut main, plan.packed_bytes)?;
            let arena = Arena::new(&device, "activations", lane_bytes)?;
            let ops = CudaOps::new(shared.clone(), stream, arena, plan.max_works)?;
            Lane::new(&device, ops, weights.clone(), packed, plan.max_works)
        };
        let mut lanes = vec![(LaneId::Main, lane(stream)?)];
        let parts = plan.partitions(&device)?;
        let prefill = match &parts {
            Some([_, rest]) => Some(Stream::within(rest, Priority::Low)?),
            None if plan.lanes > 1 => Some(Stream::new(&device, Priority::Low)?),
            None => None,
        };
        if let Some(stream) = prefill {
            lanes.push((LaneId::Prefill, lane(stream)?));
        }
        let before_graphs = device.free_bytes()?;
        let most_decodes = config.slots.min(config.max_batch_tokens) as usize;
        if config.graphs {
            let lane = &mut lanes[0].1;
            lane.capture(&slots, most_decodes)?;
            if let Some([part, _]) = &parts {
                let stream = Stream::within(part, Priority::High)?;
                lane.capture_beside(stream, &slots, most_decodes)?;
            }
        }
        let budget = vec![
            ("weights", weight_bytes),
            ("KV cache", plan.kv.bytes()),
            ("slots", main.size() - plan.kv.bytes()),
            ("activations", lane_bytes * lanes.len() as u64),
            ("graphs", before_graphs.saturating_sub(device.free_bytes()?)),
        ];
        Ok(Self {
            contract: Contract::new(plan.capacity(config)),
            budget,
            weight_formats: needs.formats,
            lanes,
            slots,
            fatal: None,
            device,
            _memory: [main, weights_arena],
        })
    }

    /// What the GPU's memory went to, in bytes.
    pub fn memory_budget(&self) -> Vec<(&'static str, u64)> {
        self.budget.clone()
    }

    /// The matrices, by the format that the file has them in.
    pub fn weight_formats(&self) -> &[WeightFormat] {
        &self.weight_formats
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn fatal(&mut self, why: String) -> ExecutorError {
        ExecutorError::Fatal(self.fatal.get_or_insert(why).clone())
    }

    fn alive(&self) -> Result<(), ExecutorError> {
        match &self.fatal {
            Some(why) => Err(ExecutorError::Fatal(why.clone())),
            None => Ok(()),
        }
    }

    /// When the last step that [`Executor::wait`] gave of a lane ran, in nanoseconds of the device's
    /// clock: what lies between two steps is time in which the lane was idle.
    pub fn last_step(&self, lane: LaneId) -> Option<Range<u64>> {
        let lane = self.lanes.iter().find(|(id, _)| *id == lane);
        lane.map(|(_, lane)| lane.last())
    }

    fn poll(&mut self) -> Option<Completion> {
        for (id, lane) in &mut self.lanes {
            if let Some(completion) = lane.poll() {
                self.contract.complete(*id);
                return Some(completion);
            }
        }
        None
    }

    /// Passes some time, at most until `deadline`: sleeping while nothing is due, spinning when a step is
    /// about to end, because to be woken takes longer than what lies between two steps should.
    fn pause(&self, now: Instant, deadline: Instant) -> Result<(), CudaError> {
        const NAP: Duration = Duration::from_micros(20);
        /// A lost device is noticed within it.
        const LONGEST_NAP: Duration = Duration::from_millis(1);
        /// What the system's timer adds to a nap.
        const WAKING: Duration = Duration::from_micros(100);
        let expected: Vec<_> = self.lanes.iter().filter_map(|l| l.1.expected()).collect();
        if expected.iter().any(|due| due.contains(&now)) {
            for _ in 0..64 {
                std::hint::spin_loop();
            }
            return Ok(());
        }
        for (_, lane) in &self.lanes {
            lane.check()?;
        }
        let overdue = expected.iter().any(|due| due.end <= now);
        let next = expected.iter().map(|due| due.start).min();
        let nap = match next {
            Some(next) if !overdue => next.saturating_duration_since(now + WAKING),
            Some(_) => NAP,
            None => LONGEST_NAP,
        };
        thread::sleep(nap.min(LONGEST_NAP).min(deadline - now));
        Ok(())
    }
}

impl Executor for CudaExecutor {
    fn capacity(&self) -> &Capacity {
        self.contract.capacity()
    }

    fn submit(&mut self, lane: LaneId, batch: Batch) -> Result<Ticket, ExecutorError> {
        self.alive()?;
        for bind in batch.rows.iter().filter_map(|row| row.bind.as_ref()) {
            Slots::check(bind).map_err(|e| ExecutorError::Rejected(e.to_string()))?;
        }
        let ticket = self.contract.submit(lane, &batch)?;
        let queued = self.device.bind().and_then(|()| {
            let beside = self
                .lanes
                .iter()
                .any(|(id, other)| *id != lane && other.is_busy());
            let lane = self.lanes.iter_mut().find(|(id, _)| *id == lane);
            let (_, lane) = lane.expect("the contract refuses lanes that are not there");
            lane.submit(ticket, &batch, &mut self.slots, beside)
        });
        if let Err(error) = queued {
            return Err(self.fatal(error.to_string()));
        }
        Ok(ticket)
    }

    fn mask(&mut self, ticket: Ticket, masks: Vec<TokenMask>) -> Result<(), ExecutorError> {
        self.alive()?;
        let id = self.contract.mask(ticket, &masks)?;
        let lane = self.lanes.iter_mut().find(|(lane, _)| *lane == id);
        if let Some((_, lane)) = lane {
            lane.mask(ticket, &masks);
        }
        Ok(())
    }

    fn wait(&mut self, deadline: Instant) -> Result<Option<Completion>, ExecutorError> {
        self.alive()?;
        if let Err(error) = self.device.bind() {
            return Err(self.fatal(error.to_string()));
        }
        loop {
            if let Some(completion) = self.poll() {
                return Ok(Some(completion));
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(None);
            }
            if let Err(error) = self.pause(now, deadline) {
                return Err(self.fatal(error.to_string()));
            }
        }
    }

    fn release(&mut self, slot: Slot) {
        if self.contract.release(slot).is_ok() {
            self.slots.release(slot);
        }
    }
}

pub(super) fn check_model(model: &ModelConfig, config: &CudaConfig) -> Result<(), CudaError> {
    let refuse = |what: String| Err(CudaError::Config(what));
    for (name, value) in [
        ("slots", config.slots),
        ("max_batch_tokens", config.max_batch_tokens),
    ] {
        if value == 0 {
            return refuse(format!("{name} must be at least 1"));
        }
    }
    if config.max_seq_len as usize > model.context_len {
        return refuse(format!(
            "a sequence length of {} is more than the model's context of {}",
            config.max_seq_len, model.context_len
        ));
    }
    let widths = [model.hidden, model.q_width(), model.kv_width(), model.ffn];
    if widths.iter().any(|width| !width.is_multiple_of(8)) || model.hidden > AddRmsNorm::MAX_WIDTH {
        return refuse(format!(
            "the GPU's kernels need widths of a multiple of 8 up to {}, the model has {widths:?}",
            AddRmsNorm::MAX_WIDTH
        ));
    }
    if model.vocab_size > MAX_VOCAB {
        return refuse(format!(
            "the GPU's sampler takes {MAX_VOCAB} tokens, the vocabulary has {}",
            model.vocab_size
        ));
    }
    let ropes = [Some(&model.rope), model.local.as_ref().map(|l| &l.rope)];
    for rope in ropes.into_iter().flatten() {
        if !Rope::supports(model.head_dim, rope.dims) {
            return refuse(format!(
                "the GPU's kernels can't rotate {} elements of a head of {}",
                rope.dims, model.head_dim
            ));
        }
    }
    if config.block_size == 0 || !config.block_size.is_multiple_of(16) {
        return refuse(format!(
            "block size {} is not a multiple of 16",
            config.block_size
        ));
    }
    Ok(())
}

/// What steps depend on besides the KV cache's size.
pub(super) struct StepPlan {
    pub(super) attention: AttentionModel,
    pub(super) max_seq_len: u32,
    slots: SlotSizes,
    /// Most parts that a sequence's positions are split into.
    splits: usize,
    max_works: usize,
    logit_tile: usize,
    lanes: usize,
}

/// Sizes, decided before memory is taken.
struct Plan {
    kv: KvPlan,
    slots: SlotSizes,
    max_seq_len: u32,
    logit_tile: usize,
    max_works: usize,
    packed_bytes: usize,
    step_tokens: Option<u32>,
    lanes: usize,
    overlap: Overlap,
    /// Rates of rotation, common parts of keys.
    constant_bytes: u64,
}

impl StepPlan {
    pub(super) fn new(model: &ModelConfig, config: &CudaConfig) -> Result<Self, CudaError> {
        let max_seq_len = match config.max_seq_len {
            0 => model.context_len as u32,
            len => len,
        };
        let max_blocks = max_seq_len.div_ceil(config.block_size) as usize;
        let slots = config.slots as usize;
        let shape = KvShape::new(
            config.kv_dtype,
            0,
            model.kv_heads as u32,
            config.block_size,
            model.head_dim as u32,
        );
        let attention = AttentionModel {
            heads: model.heads as u32,
            shape,
            scale: model.attention_scale,
            softcap: None,
        };
        if !Attention::supports(&attention) {
            return Err(CudaError::Config(format!(
                "there is no attention kernel for {} query heads on {} key/value heads of {}",
                model.heads, model.kv_heads, model.head_dim
            )));
        }
        let sizes = SlotSizes {
            slots,
            vocab: model.vocab_size,
            max_blocks,
            tables: 1 + usize::from(model.local.is_some()),
        };
        // A split has at least 256 positions.
        let splits = max_seq_len.div_ceil(256) as usize;
        Ok(Self {
            attention,
            max_seq_len,
            slots: sizes,
            splits,
            max_works: 4 * slots + splits,
            logit_tile: LOGIT_TILE.min(config.max_batch_tokens as usize),
            lanes: match config.overlap {
                Overlap::Off => 1,
                Overlap::Streams | Overlap::DecodeSms(_) => 2,
            },
        })
    }

    /// Bytes of activations and of the state of sequences, roughly: to leave room for them.
    pub(super) fn bytes(
        &self,
        model: &ModelConfig,
        config: &CudaConfig,
        needs: &WeightPlan,
    ) -> u64 {
        let tokens = config.max_batch_tokens;
        let shape = &self.attention.shape;
        let gate_up = 2 * model.ffn * tokens as usize * usize::from(needs.gate_up);
        let lane = activation_estimate(model, tokens as usize, self.logit_tile, self.max_works)
            + Arena::room_for::<bf16>(needs.scratch + gate_up)
            + kv::unpacked_bytes(shape, self.max_seq_len, tokens);
        self.lanes as u64 * lane + self.slots.bytes()
    }
}

impl Plan {
    fn new(
        device: &Device,
        model: &ModelConfig,
        config: &CudaConfig,
        weight_bytes: u64,
        needs: &WeightPlan,
    ) -> Result<Self, CudaError> {
        let steps = StepPlan::new(model, config)?;
        let step_bytes = steps.bytes(model, config, needs);
        let StepPlan {
            attention,
            max_seq_len,
            slots: sizes,
            splits,
            max_works,
            logit_tile,
            lanes,
        } = steps;
        let (shape, slots, max_blocks) = (attention.shape, sizes.slots, sizes.max_blocks);
        let tokens = config.max_batch_tokens as usize;
        // Twice for layers with and without a window.
        let decode_works = max_works.max(slots * (2 + splits));
        let prompt_works = tokens * model.heads_per_kv() / 16 + slots;
        let work = 2 * size_of::<Work>() * (prompt_works + decode_works)
            + 2 * size_of::<Sharer>() * decode_works;
        let free = device.free_bytes()?;
        let budget = match config.kv_cache_bytes {
            Some(bytes) => bytes,
            None => {
                let total =
                    (device.total_bytes() as f64 * f64::from(config.memory_utilization)) as u64;
                let left = total.checked_sub(weight_bytes + DRIVER_RESERVE + step_bytes);
                left.ok_or(CudaError::NoKvCache {
                    usable: total,
                    weights: weight_bytes,
                    steps: step_bytes,
                    driver: DRIVER_RESERVE,
                    tokens: config.max_batch_tokens,
                    slots: config.slots,
                })?
                .min(free)
            }
        };
        let kv = KvPlan::new(
            model,
            attention,
            budget,
            max_seq_len,
            config.max_batch_tokens,
        )?;
        let copies = kv.blocks() + kv.local().map_or(0, |local| local.blocks);
        // Of prompts, blocks to unpack and tables of them, in both pools.
        let unpacked = 16 * usize::from(shape.is_packed()) * slots * max_blocks;
        let packed_bytes = Packer::room_for(&[
            4 * tokens,
            4 * tokens,
            4 * tokens,
            4 * tokens,
            4 * tokens,
            size_of::<Want>() * tokens,
            8 * slots,
            work,
            8 * sizes.tables * slots * max_blocks.max(2) + 256,
            8 * copies as usize,
            unpacked,
            // Alignment of each array: binds, and attention steps in parts.
            256 * (2 * slots + 16 * (slots + 4)),
            // What a bind brings along.
            4 * max_seq_len as usize + MAX_EDITS * size_of::<u64>(),
        ]);
        Ok(Self {
            kv,
            slots: sizes,
            max_seq_len,
            logit_tile,
            max_works,
            packed_bytes,
            step_tokens: step_tokens(model, weight_bytes, device.peaks()),
            lanes,
            overlap: config.overlap,
            constant_bytes: 2 * Arena::room_for::<f64>(model.head_dim)
                + kv::common_key_bytes(model),
        })
    }

    /// The decodes' part of the GPU and the long prompts', if it is divided.
    fn partitions(&self, device: &Device) -> Result<Option<[Arc<Partition>; 2]>, CudaError> {
        let Overlap::DecodeSms(sms) = self.overlap else {
            return Ok(None);
        };
        if !(1..device.sms()).contains(&sms) {
            return Err(CudaError::Config(format!(
                "{sms} multiprocessors can't be kept for decodes: this GPU has {}",
                device.sms()
            )));
        }
        Ok(Some(Partition::split(device, sms)?.map(Arc::new)))
    }

    fn main_bytes(&self) -> u64 {
        let packed = self.lanes as u64 * self.packed_bytes.next_multiple_of(256) as u64;
        self.kv.bytes() + self.slots.bytes() + packed + self.constant_bytes
    }

    fn rotations(
        &self,
        model: &ModelConfig,
        stream: &Stream,
        arena: &mut Arena,
    ) -> Result<[Option<Rates>; 2], CudaError> {
        let mut rates = |rope: Option<&ModelRope>| -> Result<_, CudaError> {
            let Some(rope) = rope else { return Ok(None) };
            let rotation = rope.rotation(self.max_seq_len as usize);
            let rates = arena.take(rotation.rates.len())?;
            // SAFETY: the copy has run when `synchronize` returns; the arena is alive.
            unsafe { stream.upload(&rotation.rates, rates)? };
            stream.synchronize()?;
            Ok(Some(Rates {
                rates,
                magnitude: rotation.magnitude as f32,
            }))
        };
        let local = model.local.as_ref().map(|local| &local.rope);
        Ok([rates(Some(&model.rope))?, rates(local)?])
    }

    fn capacity(&self, config: &CudaConfig) -> Capacity {
        Capacity {
            slots: config.slots,
            blocks: self.kv.blocks(),
            block_size: config.block_size,
            max_batch_tokens: config.max_batch_tokens,
            step_tokens: self.step_tokens,
            max_seq_len: self.max_seq_len,
            vocab_size: self.slots.vocab as u32,
            lanes: [LaneId::Main, LaneId::Prefill][..self.lanes].to_vec(),
            depth: DEPTH as u32,
            local: self.kv.local(),
        }
    }
}

/// A lane's memory and the descriptions, roughly: to leave room for them.
fn activation_estimate(
    model: &ModelConfig,
    tokens: usize,
    logit_tile: usize,
    max_works: usize,
) -> u64 {
    let widths = 3 * model.hidden + 2 * model.q_width() + 2 * model.kv_width() + model.ffn;
    let logits = logit_tile * (4 * model.vocab_size + 2 * model.hidden);
    let scratch = max_works * model.heads * (model.head_dim + 2) * 4;
    (tokens * (2 * widths + 8 * model.head_dim + 1024) + logits + scratch) as u64
}
