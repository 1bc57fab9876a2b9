use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use spate_model::{Activation, ModelConfig, Ops};

use super::kv::{KvPools, Pool, Unpacked};
use super::loader::{Matrix, Stored};
use super::masks::Masks;
use super::step::{PromptStep, Step};
use crate::CudaError;
use crate::driver::{Arena, Device, Slice, Stream};
use crate::kernels::{
    ActMul, AddRmsNorm, Chosen, CopyBlocks, DecodeScratch, Embed, MAX_TOP, Output, Path, Product,
    QkNormRopeAppend, Rope, Sample, SampleTile, Scatter, SlotMemory, StepIo, Top, Turn,
};
use crate::linear::Linear;

/// Rows of a tile of logits are aligned to so many elements.
const ALIGN: usize = 8;

/// Every kernel, loaded once for all lanes.
pub(crate) struct Kernels {
    pub(crate) embed: Embed,
    pub(crate) add_rms_norm: AddRmsNorm,
    pub(crate) act_mul: ActMul,
    pub(crate) linear: Linear,
    pub(crate) rope: Rope,
    pub(crate) sample: Sample,
    pub(crate) copy_blocks: CopyBlocks,
    pub(crate) scatter: Scatter,
    pub(crate) step_io: StepIo,
}

impl Kernels {
    pub(crate) fn load(device: &Device, path: Path) -> Result<Self, CudaError> {
        Ok(Self {
            embed: Embed::load(device)?,
            add_rms_norm: AddRmsNorm::load(device)?,
            act_mul: ActMul::load(device)?,
            linear: Linear::load(device, path)?,
            rope: Rope::load(device)?,
            sample: Sample::load(device)?,
            copy_blocks: CopyBlocks::load(device)?,
            scatter: Scatter::load(device)?,
            step_io: StepIo::load(device)?,
        })
    }
}

/// What all lanes share: kernels and memory that the whole model uses.
pub(crate) struct Shared {
    pub(crate) kernels: Kernels,
    pub(crate) config: ModelConfig,
    pub(crate) pools: KvPools,
    pub(crate) slots: SlotMemory,
    /// Rotation of layers that see everything, and of those with a window.
    pub(crate) rotations: [Option<Rates>; 2],
    /// For each layer what is taken from every key, see [`super::kv::common_keys`].
    pub(crate) common_keys: Vec<Option<Slice<f32>>>,
    /// Most tokens of a step.
    pub(crate) max_tokens: usize,
    /// Longest sequence.
    pub(crate) max_seq_len: usize,
    /// Most rows of a step.
    pub(crate) max_rows: usize,
    /// Positions whose logits exist at the same time.
    pub(crate) logit_tile: usize,
    /// Elements that products with quantised weights need.
    pub(crate) scratch: usize,
    /// See [`WeightPlan`](super::loader::WeightPlan).
    pub(crate) gate_up: bool,
}

/// How fast each rotated pair turns.
pub(crate) struct Rates {
    /// Radians per position.
    pub(crate) rates: Slice<f64>,
    pub(crate) magnitude: f32,
}

/// A lane's activations.
pub(crate) struct Act {
    width: usize,
    data: Slice<bf16>,
}

/// [`Ops`] on a stream, with the scratch memory of one lane.
pub(crate) struct CudaOps {
    pub(crate) shared: Arc<Shared>,
    pub(crate) stream: Arc<Stream>,
    arena: Arena,
    /// `[tokens][pairs][2]`, as in [`Shared::rotations`].
    rotations: [Slice<f32>; 2],
    decode: DecodeScratch,
    /// What prompts read, if the cache has codes.
    unpacked_kv: Option<Unpacked>,
    /// Unpacked weights.
    unpacked: Slice<bf16>,
    /// Gate and up projections, `[tokens, 2 * ffn]`, if they are needed.
    gate_up: Slice<bf16>,
    /// Hidden states of a tile of wanted positions.
    picked: Slice<bf16>,
    /// `[tile, vocab]`, the vocabulary rounded up.
    logits: Slice<f32>,
    /// Room for a prompt.
    pub(crate) prompt: Slice<u32>,
    pub(crate) turn: Slice<Turn>,
    pub(crate) masks: Masks,
    /// One per row.
    pub(crate) failed: Slice<u32>,
    /// `[2]` per wanted position, tile after tile.
    pub(crate) chosen: Slice<Chosen>,
    /// `[2][MAX_TOP]` per wanted position.
    pub(crate) tops: Slice<Top>,
}

impl Shared {
    fn padded_vocab(&self) -> usize {
        self.config.vocab_size.next_multiple_of(ALIGN)
    }

    fn gate_up_width(&self) -> usize {
        2 * self.config.ffn * usize::from(self.gate_up)
    }

    fn pairs(&self, which: usize) -> usize {
        self.rotations[which].as_ref().map_or(0, |r| r.rates.len())
    }

    /// Bytes of a lane's memory, activations included.
    pub(crate) fn lane_bytes(&self, max_works: usize) -> u64 {
        let (c, n) = (&self.config, self.max_tokens);
        let act = |width: usize| Arena::room_for::<bf16>(n * width);
        let qkv = c.q_width() + 2 * c.kv_width();
        3 * act(c.hidden)
            + act(qkv)
            + act(c.q_width())
            + act(self.gate_up_width())
            + act(c.ffn)
            + Arena::room_for::<f32>(2 * n * self.pairs(0))
            + Arena::room_for::<f32>(2 * n * self.pairs(1))
            + self.pools.main.attention.scratch_bytes(max_works)
            + self.pools.unpacked_bytes()
            + Arena::room_for::<bf16>(self.scratch)
            + Arena::room_for::<bf16>(self.logit_tile * c.hidden)
            + Arena::room_for::<f32>(self.logit_tile * self.padded_vocab())
            + Arena::room_for::<u32>(self.max_seq_len)
            + Arena::room_for::<Turn>(1)
            + Arena::room_for::<u32>(self.max_rows * Masks::words(self.config.vocab_size))
            + Arena::room_for::<u32>(self.max_rows)
            + Arena::room_for::<Chosen>(2 * n)
            + Arena::room_for::<Top>(2 * n * MAX_TOP)
    }
}

impl CudaOps {
    /// `arena`: as large as [`Shared::lane_bytes`] says.
    pub(crate) fn new(
        shared: Arc<Shared>,
        stream: Stream,
        mut arena: Arena,
        max_works: usize,
    ) -> Result<Self, CudaError> {
        let n = shared.max_tokens;
        let attention = &shared.pools.main.attention;
        let decode = attention.take_scratch(&mut arena, max_works)?;
        let unpacked_kv = shared.pools.take_unpacked(&mut arena)?;
        let rotations = [
            arena.take(2 * n * shared.pairs(0))?,
            arena.take(2 * n * shared.pairs(1))?,
        ];
        let unpacked = arena.take(shared.scratch)?;
        let gate_up = arena.take(n * shared.gate_up_width())?;
        let picked = arena.take(shared.logit_tile * shared.config.hidden)?;
        let logits = arena.take(shared.logit_tile * shared.padded_vocab())?;
        let (prompt, turn) = (arena.take(shared.max_seq_len)?, arena.take(1)?);
        let vocab = shared.config.vocab_size;
        let masks = arena.take(shared.max_rows * Masks::words(vocab))?;
        let (failed, chosen) = (arena.take(shared.max_rows)?, arena.take(2 * n)?);
        let tops = arena.take(2 * n * MAX_TOP)?;
        // The attention's counters and the turn start at zero.
        // SAFETY: the arena is kept.
        unsafe { stream.fill(arena.whole(), 0)? };
        Ok(Self {
            masks: Masks::new(arena.device(), vocab, masks)?,
            shared,
            stream: Arc::new(stream),
            arena,
            rotations,
            decode,
            unpacked_kv,
            unpacked,
            gate_up,
            picked,
            logits,
            prompt,
            turn,
            failed,
            chosen,
            tops,
        })
    }

    /// Queues what comes before the rows: block copies, tables.
    pub(crate) fn begin(&mut self, step: &Step, tables: Slice<u32>) -> Result<(), CudaError> {
        let s = &self.shared;
        // SAFETY: the contract checked the blocks, indices are made from slots; memory lives as long
        // as the lane.
        unsafe {
            let copies = &s.kernels.copy_blocks;
            let main = &s.pools.main;
            copies.launch(&self.stream, &main.shape, step.copies, main.cache)?;
            if let Some(local) = &s.pools.local {
                copies.launch(&self.stream, &local.shape, step.local_copies, local.cache)?;
            }
            s.kernels.scatter.launch(&self.stream, step.words, tables)
        }
    }

    /// A product of `x` with a matrix.
    fn multiply(
        &self,
        tokens: usize,
        matrix: &Matrix,
        gate: Option<Activation>,
        x: Slice<bf16>,
        out: Output,
    ) -> Result<(), CudaError> {
        let mut product = Product {
            tokens,
            outputs: matrix.rows,
            inputs: matrix.cols,
            x,
            weights: Slice::null(),
            fresh_weights: false,
            gate,
            bias: matrix.bias,
            out,
            stride: 0,
        };
        product.stride = product.width();
        let linear = &self.shared.kernels.linear;
        // SAFETY: see below.
        unsafe {
            match &matrix.stored {
                Stored::Bf16(weights) => {
                    product.weights = *weights;
                    linear.launch(&self.stream, &product)
                }
                Stored::Packed(parts) => {
                    linear.launch_packed(&self.stream, parts, &product, self.unpacked)
                }
            }
        }
    }

    fn tile(&self, step: &Step, tile: usize) -> Range<usize> {
        let start = tile * self.shared.logit_tile;
        start..step.wants.len().min(start + self.shared.logit_tile)
    }

    /// Which of [`Shared::rotations`] a layer uses.
    fn rotation_of(&self, layer: usize) -> usize {
        usize::from(self.shared.config.window(layer).is_some())
    }
}

// SAFETY (of all launches here): buffers belong to arenas that live as long as the lane, whose stream
// is drained before it is dropped; indices come from a checked batch.
impl Ops for CudaOps {
    type Matrix = Matrix;
    type Vector = Slice<f32>;
    type Act = Act;
    type Step = Step;
    type Error = CudaError;

    fn alloc(&mut self, width: usize) -> Result<Act, CudaError> {
        let data = self.arena.take(self.shared.max_tokens * width)?;
        Ok(Act { width, data })
    }

    fn embed(
        &mut self,
        step: &Step,
        table: &Matrix,
        scale: f32,
        out: &mut Act,
    ) -> Result<(), CudaError> {
        let (s, n) = (&self.shared, step.tokens.len());
        for (rates, to) in s.rotations.iter().zip(self.rotations) {
            let Some(Rates { rates, magnitude }) = rates else {
                continue;
            };
            // SAFETY: see above.
            unsafe {
                let rope = &s.kernels.rope;
                rope.rotations(&self.stream, step.positions, *rates, *magnitude, to)?;
            }
        }
        let (last, width) = (s.slots.last, out.width);
        let out = out.data.range(0..n * width);
        let (stream, tokens) = (&self.stream, step.tokens);
        // SAFETY: see above.
        unsafe {
            match &table.stored {
                Stored::Bf16(table) => {
                    let embed = &s.kernels.embed;
                    embed.launch(stream, tokens, last, *table, scale, width, out)
                }
                Stored::Packed(parts) => {
                    let table = parts.first().expect("a matrix has rows");
                    let packed = s.kernels.linear.packed();
                    packed.embed(stream, tokens, last, table, scale, width, out)
                }
            }
        }
    }

    fn add_rms_norm(
        &mut self,
        step: &Step,
        delta: Option<(&Act, Option<&Slice<f32>>)>,
        residual: &mut Act,
        norm: &Slice<f32>,
        out: &mut Act,
    ) -> Result<(), CudaError> {
        let (s, n) = (&self.shared, step.tokens.len());
        let delta = delta.map(|(delta, norm)| (delta.data, norm.copied()));
        let eps = s.config.norm_eps;
        // SAFETY: see above.
        unsafe {
            let kernel = &s.kernels.add_rms_norm;
            kernel.launch(&self.stream, n, delta, residual.data, *norm, eps, out.data)
        }
    }

    fn linear(
        &mut self,
        step: &Step,
        matrix: &Matrix,
        x: &Act,
        out: &mut Act,
    ) -> Result<(), CudaError> {
        let out = Output::Bf16(out.data);
        self.multiply(step.tokens.len(), matrix, None, x.data, out)
    }

    fn gated_linear(
        &mut self,
        step: &Step,
        matrix: &Matrix,
        activation: Activation,
        x: &Act,
        out: &mut Act,
    ) -> Result<(), CudaError> {
        let (kernels, n) = (&self.shared.kernels, step.tokens.len());
        if kernels.linear.can_gate() && matches!(matrix.stored, Stored::Bf16(_)) {
            let out = Output::Bf16(out.data);
            return self.multiply(n, matrix, Some(activation), x.data, out);
        }
        self.multiply(n, matrix, None, x.data, Output::Bf16(self.gate_up))?;
        let (stream, gate_up) = (&self.stream, self.gate_up);
        // SAFETY: see above.
        unsafe {
            let act_mul = &kernels.act_mul;
            act_mul.launch(stream, activation, n, out.width, gate_up, out.data)
        }
    }

    fn qk_norm_rope_append(
        &mut self,
        step: &Step,
        layer: usize,
        norms: Option<(&Slice<f32>, &Slice<f32>)>,
        qkv: &mut Act,
    ) -> Result<(), CudaError> {
        let s = &self.shared;
        let (pool, pool_layer) = s.pools.of(layer);
        let model = QkNormRopeAppend {
            heads: s.config.heads as u32,
            shape: pool.shape,
            pairing: s.config.rope(layer).pairing,
            pairs: (s.config.rope(layer).dims / 2) as u32,
            eps: s.config.norm_eps,
        };
        let rotations = self.rotations[self.rotation_of(layer)];
        let norms = norms.map(|(q, k)| (*q, *k));
        let places = match s.pools.is_local(layer) {
            true => step.local_places,
            false => step.places,
        };
        // SAFETY: see above.
        unsafe {
            let rope = &s.kernels.rope;
            rope.append(
                &self.stream,
                &model,
                pool_layer,
                norms,
                rotations,
                s.common_keys[layer],
                places,
                qkv.data,
                pool.cache,
            )
        }
    }

    fn attention(
        &mut self,
        step: &Step,
        layer: usize,
        qkv: &Act,
        out: &mut Act,
    ) -> Result<(), CudaError> {
        let (pool, pool_layer) = self.shared.pools.of(layer);
        let Pool { attention, .. } = pool;
        let lists = match self.shared.config.window(layer) {
            Some(_) => step
                .local
                .as_ref()
                .expect("a step has lists for every window"),
            None => &step.global,
        };
        // SAFETY: see above. Steps of a lane run one after another, so the scratch is theirs.
        unsafe {
            for PromptStep { blocks, step } in &lists.prompts {
                let (attention, layer) = match &self.unpacked_kv {
                    Some(unpacked) => {
                        unpacked.fill(&self.stream, pool, pool_layer, *blocks)?;
                        (&unpacked.attention, 0)
                    }
                    None => (attention, pool_layer),
                };
                attention.prefill(&self.stream, step, layer, qkv.data, out.data)?;
            }
            for decode in &lists.decodes {
                let scratch = &self.decode;
                attention.decode(
                    &self.stream,
                    decode,
                    scratch,
                    pool_layer,
                    qkv.data,
                    out.data,
                )?;
            }
        }
        Ok(())
    }

    fn check(&mut self, step: &mut Step, x: &Act) -> Result<(), CudaError> {
        let s = &self.shared;
        let (rows, last) = (step.rows, s.slots.last);
        // SAFETY: see above.
        unsafe {
            let kernel = &s.kernels.sample;
            kernel.check(&self.stream, x.data, x.width, rows, last, self.failed)
        }
    }

    fn logit_tiles(&self, step: &Step) -> Range<usize> {
        0..step.wants.len().div_ceil(self.shared.logit_tile)
    }

    fn logits(
        &mut self,
        step: &Step,
        tile: usize,
        head: &Matrix,
        x: &Act,
    ) -> Result<(), CudaError> {
        let picks = step.picks.range(self.tile(step, tile));
        let s = &self.shared;
        // A row of hidden states is found by its index as a row of embeddings is by its id.
        // SAFETY: see above.
        unsafe {
            let (embed, last) = (&s.kernels.embed, s.slots.last);
            embed.launch(&self.stream, picks, last, x.data, 1.0, x.width, self.picked)?;
        }
        let out = Output::F32(self.logits);
        self.multiply(picks.len(), head, None, self.picked, out)
    }

    fn sample(&mut self, step: &mut Step, tile: usize) -> Result<(), CudaError> {
        let (s, range) = (&self.shared, self.tile(step, tile));
        if tile == 0 {
            // SAFETY: see above.
            unsafe {
                let io = &s.kernels.step_io;
                self.masks.fetch(&self.stream, io, step.packed, self.turn)?;
            }
        }
        let results = 2 * range.start..2 * range.end;
        let tile = SampleTile {
            logits: self.logits,
            stride: s.padded_vocab(),
            vocab: s.config.vocab_size,
            wants: step.wants.range(range),
            masks: self.masks.on_device(),
            failed: self.failed,
            chosen: self.chosen.range(results.clone()),
            tops: self
                .tops
                .range(results.start * MAX_TOP..results.end * MAX_TOP),
        };
        // SAFETY: see above.
        unsafe { s.kernels.sample.sample(&self.stream, &tile, &s.slots) }
    }
}
