use std::ops::Range;

use spate_executor::BlockCopy;
use spate_model::{Activation, ModelConfig, Ops};
use spate_types::{Logprobs, SampledToken};

use crate::attention::Attention;
use crate::common_key;
use crate::kv::{KvCache, KvLine, KvPools};
use crate::linear::{F32x16, Isa, Scratch, advise_huge_pages, linear};
use crate::masks::Masks;
use crate::math::{ActMul, AddRmsNorm, RmsNorm};
use crate::pool::Disjoint;
use crate::rope::{NormRotate, Ropes};
use crate::sampler;
use crate::slots::SlotState;
use crate::step::{Span, Step, Wanted};
use crate::weights::Matrix;
use crate::{CpuError, ThreadPool};

/// Positions whose logits exist at the same time.
pub(crate) const LOGIT_TILE: usize = 16;

/// Tokens that elementwise loops do on one thread: fewer are not worth waking another.
const TASK_TOKENS: usize = 8;

/// [`Ops`] on the CPU, with everything that lives on the "device" beside the weights.
pub(crate) struct CpuOps {
    isa: Isa,
    pool: ThreadPool,
    config: ModelConfig,
    pub(crate) ropes: Ropes,
    /// See [`common_key::common_keys`].
    common_keys: Vec<Vec<f32>>,
    max_tokens: usize,
    /// Bytes that [`Ops::alloc`] gave out.
    allocated: u64,
    kv: KvCache,
    pub(crate) slots: Vec<Option<SlotState>>,
    scratch: Scratch,
    /// Gate and up projections, `[tokens, 2 * ffn]`.
    gate_up: Act,
    /// Hidden states of a tile of positions that want logits, `[LOGIT_TILE, hidden]`.
    picked: Act,
    /// `[LOGIT_TILE, vocab_size]`
    logits: Act,
    sampling: Vec<sampler::Scratch>,
    masks: Masks,
}

/// Activations, `[tokens, width]`; those of a stacked matrix as [`Matrix`] says.
pub(crate) struct Act {
    width: usize,
    rows: usize,
    /// Aligned, so that a register's sixteen numbers lie in one cache line where widths allow it.
    data: Vec<F32x16>,
}

impl Act {
    fn new(rows: usize, width: usize) -> Result<Self, CpuError> {
        let mut data = Vec::new();
        let len = rows.saturating_mul(width);
        data.try_reserve_exact(len.div_ceil(16))
            .map_err(|_| CpuError::OutOfMemory {
                what: "activations",
                bytes: len.saturating_mul(size_of::<f32>()),
            })?;
        // Tokens lie some pages apart, and a product touches those of dozens of them in turn.
        advise_huge_pages(data.as_ptr(), data.capacity());
        data.resize(len.div_ceil(16), F32x16([0.0; 16]));
        Ok(Self { width, rows, data })
    }

    fn bytes(&self) -> usize {
        self.rows * self.width * size_of::<f32>()
    }

    fn rows(&self, count: usize) -> &[f32] {
        &F32x16::flatten(&self.data)[..count * self.width]
    }

    fn rows_mut(&mut self, count: usize) -> &mut [f32] {
        &mut F32x16::flatten_mut(&mut self.data)[..count * self.width]
    }
}

impl CpuOps {
    pub(crate) fn new(
        pool: ThreadPool,
        config: &ModelConfig,
        ropes: Ropes,
        common_keys: Vec<Vec<f32>>,
        kv: KvCache,
        [slots, max_tokens]: [usize; 2],
        masks: Masks,
    ) -> Result<Self, CpuError> {
        let c = config;
        let widest = c.hidden.max(c.q_width()).max(c.ffn);
        Ok(Self {
            isa: Isa::best(),
            scratch: Scratch::new(max_tokens, widest),
            gate_up: Act::new(max_tokens, 2 * c.ffn)?,
            pool,
            ropes,
            common_keys,
            max_tokens,
            allocated: 0,
            kv,
            slots: (0..slots).map(|_| None).collect(),
            picked: Act::new(LOGIT_TILE, c.hidden)?,
            logits: Act::new(LOGIT_TILE, c.vocab_size)?,
            sampling: (0..LOGIT_TILE).map(|_| Default::default()).collect(),
            masks,
            config: config.clone(),
        })
    }

    /// Bytes of all activations and scratch memory, once the transformer has its share.
    pub(crate) fn activation_bytes(&self) -> u64 {
        let own = [&self.gate_up, &self.picked, &self.logits].map(Act::bytes);
        self.allocated + (own.iter().sum::<usize>() + self.scratch.bytes()) as u64
    }

    pub(crate) fn copy_block(&mut self, copy: BlockCopy, local: bool) {
        self.kv.copy(copy, local);
    }

    /// Elements that one task takes of a buffer of `width`.
    fn chunk(&self, step: &Step, width: usize) -> usize {
        let tasks = self.pool.threads() * 4;
        step.tokens.len().div_ceil(tasks).max(TASK_TOKENS) * width
    }
}

/// `out = x * matrix^T (+ bias)` for `m` rows.
fn apply(
    pool: &ThreadPool,
    scratch: &mut Scratch,
    matrix: &Matrix,
    x: &[f32],
    m: usize,
    out: &mut [f32],
) {
    let mut rest = out;
    let mut outs = Vec::with_capacity(matrix.parts.len());
    for part in &matrix.parts {
        let (out, tail) = rest.split_at_mut(m * part.rows());
        outs.push(out);
        rest = tail;
    }
    let parts: Vec<_> = matrix.parts.iter().collect();
    linear(pool, &parts, x, m, &mut outs, scratch);
    let Some(mut bias) = matrix.bias.as_deref() else {
        return;
    };
    for (part, out) in parts.iter().zip(outs) {
        let (own, tail) = bias.split_at(part.rows());
        for row in out.chunks_exact_mut(own.len()) {
            row.iter_mut().zip(own).for_each(|(out, b)| *out += b);
        }
        bias = tail;
    }
}

impl Ops for CpuOps {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Act = Act;
    type Step = Step;
    type Error = CpuError;

    fn alloc(&mut self, width: usize) -> Result<Act, CpuError> {
        let act = Act::new(self.max_tokens, width)?;
        self.allocated += act.bytes() as u64;
        Ok(act)
    }

    fn embed(
        &mut self,
        step: &Step,
        table: &Matrix,
        scale: f32,
        out: &mut Act,
    ) -> Result<(), CpuError> {
        let width = out.width;
        let chunk = self.chunk(step, width);
        let out = out.rows_mut(step.tokens.len());
        self.pool.run_chunks(out, chunk, |i, out| {
            let tokens = &step.tokens[i * (chunk / width)..];
            for (&token, row) in tokens.iter().zip(out.chunks_exact_mut(width)) {
                table.parts[0].row_to_f32(token as usize, row);
                row.iter_mut().for_each(|x| *x *= scale);
            }
        });
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        step: &Step,
        delta: Option<(&Act, Option<&Vec<f32>>)>,
        residual: &mut Act,
        norm: &Vec<f32>,
        out: &mut Act,
    ) -> Result<(), CpuError> {
        let (m, width, eps) = (step.tokens.len(), out.width, self.config.norm_eps);
        let chunk = self.chunk(step, width);
        let residual = residual.rows_mut(m);
        if let Some((delta, norm)) = delta {
            self.pool.run_chunks(residual, chunk, |i, residual| {
                let delta = &delta.rows(m)[i * chunk..];
                let Some(norm) = norm else {
                    residual.iter_mut().zip(delta).for_each(|(r, d)| *r += d);
                    return;
                };
                let rows = delta.chunks_exact(width);
                for (x, residual) in rows.zip(residual.chunks_exact_mut(width)) {
                    self.isa.run(AddRmsNorm {
                        x,
                        norm,
                        eps,
                        residual,
                    });
                }
            });
        }
        let residual = &*residual;
        self.pool.run_chunks(out.rows_mut(m), chunk, |i, out| {
            let x = residual[i * chunk..].chunks_exact(width);
            for (x, out) in x.zip(out.chunks_exact_mut(width)) {
                self.isa.run(RmsNorm { x, norm, eps, out });
            }
        });
        Ok(())
    }

    fn linear(
        &mut self,
        step: &Step,
        matrix: &Matrix,
        x: &Act,
        out: &mut Act,
    ) -> Result<(), CpuError> {
        let m = step.tokens.len();
        let (x, out) = (x.rows(m), out.rows_mut(m));
        apply(&self.pool, &mut self.scratch, matrix, x, m, out);
        Ok(())
    }

    fn gated_linear(
        &mut self,
        step: &Step,
        matrix: &Matrix,
        activation: Activation,
        x: &Act,
        out: &mut Act,
    ) -> Result<(), CpuError> {
        let m = step.tokens.len();
        let gate_up = self.gate_up.rows_mut(m);
        apply(&self.pool, &mut self.scratch, matrix, x.rows(m), m, gate_up);
        let chunk = self.chunk(step, out.width);
        let (gate, up) = self.gate_up.rows(m).split_at(m * out.width);
        self.pool.run_chunks(out.rows_mut(m), chunk, |i, out| {
            let range = i * chunk..i * chunk + out.len();
            self.isa.run(ActMul {
                activation,
                gate: &gate[range.clone()],
                up: &up[range],
                out,
            });
        });
        Ok(())
    }

    fn qk_norm_rope_append(
        &mut self,
        step: &Step,
        layer: usize,
        norms: Option<(&Vec<f32>, &Vec<f32>)>,
        qkv: &mut Act,
    ) -> Result<(), CpuError> {
        let m = step.tokens.len();
        let (q_width, kv_width) = (self.config.q_width(), self.config.kv_width());
        let (q, rest) = qkv.rows_mut(m).split_at_mut(m * q_width);
        let (k, v) = rest.split_at_mut(m * kv_width);
        let rope = self.ropes.of_layer[layer];
        let pairs = self.ropes.rotations[rope].rates.len();
        let rotations = &step.rotations[rope];
        let (q_norm, k_norm) = norms.unzip();
        for (x, width, norm) in [(q, q_width, q_norm), (&mut *k, kv_width, k_norm)] {
            let chunk = self.chunk(step, width);
            self.pool.run_chunks(x, chunk, |i, x| {
                let (first, count) = (i * (chunk / width), x.len() / width);
                self.isa.run(NormRotate {
                    x,
                    width,
                    head_dim: self.config.head_dim,
                    rotations: &rotations[first * pairs..][..count * pairs],
                    pairing: self.config.rope(layer).pairing,
                    norm: norm.map(|n| (n.as_slice(), self.config.norm_eps)),
                });
            });
        }
        common_key::subtract(k, &self.common_keys[layer]);
        match &mut self.kv {
            KvCache::F32(kv) => append(&self.pool, kv, step, layer, k, v),
            KvCache::F16(kv) => append(&self.pool, kv, step, layer, k, v),
            KvCache::Bf16(kv) => append(&self.pool, kv, step, layer, k, v),
            KvCache::Int8(kv) => append(&self.pool, kv, step, layer, k, v),
        }
        Ok(())
    }

    fn attention(
        &mut self,
        step: &Step,
        layer: usize,
        qkv: &Act,
        out: &mut Act,
    ) -> Result<(), CpuError> {
        match &self.kv {
            KvCache::F32(kv) => self.attend(kv, step, layer, qkv, out),
            KvCache::F16(kv) => self.attend(kv, step, layer, qkv, out),
            KvCache::Bf16(kv) => self.attend(kv, step, layer, qkv, out),
            KvCache::Int8(kv) => self.attend(kv, step, layer, qkv, out),
        }
        Ok(())
    }

    fn check(&mut self, step: &mut Step, x: &Act) -> Result<(), CpuError> {
        let x = x.rows(step.tokens.len());
        for (row, output) in step.rows.iter().zip(&mut step.outputs) {
            let last = &x[row.last * self.config.hidden..][..self.config.hidden];
            output.failed |= !sampler::finite(self.isa, last);
        }
        Ok(())
    }

    fn logit_tiles(&self, step: &Step) -> Range<usize> {
        0..step.wanted.len().div_ceil(LOGIT_TILE)
    }

    fn logits(&mut self, step: &Step, tile: usize, head: &Matrix, x: &Act) -> Result<(), CpuError> {
        let wanted = tile_of(step, tile);
        let picked = self.picked.rows_mut(LOGIT_TILE).chunks_exact_mut(x.width);
        for (wanted, picked) in wanted.iter().zip(picked) {
            picked.copy_from_slice(&x.rows(wanted.token + 1)[wanted.token * x.width..]);
        }
        let m = wanted.len();
        let (picked, logits) = (self.picked.rows(m), self.logits.rows_mut(m));
        apply(&self.pool, &mut self.scratch, head, picked, m, logits);
        Ok(())
    }

    fn sample(&mut self, step: &mut Step, tile: usize) -> Result<(), CpuError> {
        if step.masks.len() < step.masked {
            step.masks = self.masks.of(step.ticket)?;
        }
        let wanted = tile_of(step, tile);
        let width = self.logits.width;
        let logits = self.logits.rows_mut(LOGIT_TILE).chunks_exact_mut(width);
        let buffers = logits.zip(&mut self.sampling);
        let mut choices: Vec<Choice<'_>> = wanted
            .iter()
            .zip(buffers)
            .map(|(&wanted, (logits, scratch))| Choice {
                wanted,
                logits,
                scratch,
                result: None,
            })
            .collect();
        let (isa, shared, slots) = (self.isa, &*step, &self.slots);
        self.pool.run_chunks(&mut choices, 1, |_, choices| {
            choices.iter_mut().for_each(|c| c.make(isa, shared, slots));
        });
        for Choice { wanted, result, .. } in choices {
            let slot = step.rows[wanted.row].slot.0 as usize;
            let slot = self.slots[slot].as_mut().expect("rows are bound");
            let output = &mut step.outputs[wanted.row];
            let Some((logprobs, sampled)) = result else {
                output.failed = true;
                slot.last = None;
                continue;
            };
            output.prompt_logprobs.extend(logprobs);
            if let Some(sampled) = sampled {
                slot.sampled(sampled.token);
                output.sampled = Some(sampled);
            }
        }
        Ok(())
    }
}

fn tile_of(step: &Step, tile: usize) -> &[Wanted] {
    let end = step.wanted.len().min((tile + 1) * LOGIT_TILE);
    &step.wanted[tile * LOGIT_TILE..end]
}

/// A wanted position with its logits on the way to a result.
struct Choice<'a> {
    wanted: Wanted,
    logits: &'a mut [f32],
    scratch: &'a mut sampler::Scratch,
    /// Absent if the logits are not finite.
    result: Option<(Option<Logprobs>, Option<SampledToken>)>,
}

impl Choice<'_> {
    fn make(&mut self, isa: Isa, step: &Step, slots: &[Option<SlotState>]) {
        let Self {
            wanted,
            logits,
            scratch,
            result,
        } = self;
        if step.outputs[wanted.row].failed || !sampler::finite(isa, logits) {
            return;
        }
        let slot = slots[step.rows[wanted.row].slot.0 as usize].as_ref();
        let slot = slot.expect("rows are bound");
        let logprobs = wanted.target.map(|target| {
            let k = slot.sampling.prompt_logprobs.unwrap_or(0);
            sampler::logprobs(isa, logits, target, k, scratch)
        });
        let position = step.positions[wanted.token] + 1;
        let mask = wanted.mask.map(|mask| &*step.masks[mask]);
        let sampled = wanted
            .sample
            .then(|| sampler::sample(isa, logits, slot, position, mask, scratch));
        *result = Some((logprobs, sampled));
    }
}

/// Writes the keys and values of a step, `[tokens, kv_heads * head_dim]` each.
fn append<C: KvLine>(
    pool: &ThreadPool,
    kv: &mut KvPools<C>,
    step: &Step,
    layer: usize,
    keys: &[f32],
    values: &[f32],
) {
    let local = kv.is_local(layer);
    let place = |token: usize| {
        let pages = step.rows[step.row_of[token]].pages(local);
        (pages, step.positions[token] as usize)
    };
    kv.append(pool, layer, place, keys, values);
}

impl CpuOps {
    fn attend<C: KvLine>(
        &self,
        kv: &KvPools<C>,
        step: &Step,
        layer: usize,
        qkv: &Act,
        out: &mut Act,
    ) {
        let c = &self.config;
        let m = step.tokens.len();
        let queries = &qkv.rows(m)[..m * c.q_width()];
        let out = Disjoint::new(out.rows_mut(m));
        let window = c.window(layer).unwrap_or(usize::MAX);
        let local = kv.is_local(layer);
        self.pool.run(step.spans.len() * c.kv_heads, |task| {
            // The spans at the end of a prompt see the most positions: they go first.
            let span = step.spans.len() - 1 - task / c.kv_heads;
            let Span { row, token, count } = step.spans[span];
            let kv_head = task % c.kv_heads;
            self.isa.run(Attention {
                kv: kv.head(layer, kv_head),
                pages: step.rows[row].pages(local),
                queries,
                out: &out,
                token,
                position: step.positions[token] as usize,
                tokens: count,
                heads: c.heads,
                head: kv_head * c.heads_per_kv(),
                group: c.heads_per_kv(),
                scale: c.attention_scale,
                window,
            });
        });
    }
}
