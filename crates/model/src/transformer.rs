use std::ops::Range;

use crate::{LayerWeights, ModelConfig, Ops, Weights};

/// A decoder-only transformer: the forward pass, written once over [`Ops`].
pub struct Transformer<O: Ops> {
    config: ModelConfig,
    weights: Weights<O::Matrix, O::Vector>,
    arena: Arena<O::Act>,
}

/// Activations of one step. Each buffer has room for the largest step and is reused by all layers.
struct Arena<A> {
    /// The residual stream, `[tokens, hidden]`.
    residual: A,
    /// A block's normalised input, `[tokens, hidden]`.
    normed: A,
    /// A block's output, not yet added to the residual, `[tokens, hidden]`.
    delta: A,
    /// Query, key and value heads, `[tokens, (heads + 2 * kv_heads) * head_dim]`.
    qkv: A,
    /// Attention output, `[tokens, heads * head_dim]`.
    attn: A,
    /// The gated product of gate and up projections, `[tokens, ffn]`.
    gated: A,
}

impl<O: Ops> Transformer<O> {
    /// Allocates the activations.
    ///
    /// # Errors
    /// When there is no room for them.
    pub fn new(
        config: ModelConfig,
        weights: Weights<O::Matrix, O::Vector>,
        ops: &mut O,
    ) -> Result<Self, O::Error> {
        let c = &config;
        let arena = Arena {
            residual: ops.alloc(c.hidden)?,
            normed: ops.alloc(c.hidden)?,
            delta: ops.alloc(c.hidden)?,
            qkv: ops.alloc(c.q_width() + 2 * c.kv_width())?,
            attn: ops.alloc(c.q_width())?,
            gated: ops.alloc(c.ffn)?,
        };
        Ok(Self {
            config,
            weights,
            arena,
        })
    }

    /// What the model looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs a range of layers on a step. The range that starts at 0 begins with the embedding; the
    /// one that ends with the last layer goes on to logits and samples. Ranges of one step must
    /// follow each other: a backend may let other work run between them, on other activations.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn forward(
        &mut self,
        ops: &mut O,
        step: &mut O::Step,
        layers: Range<usize>,
    ) -> Result<(), O::Error> {
        let last = layers.end == self.weights.layers.len();
        self.hidden(ops, step, layers)?;
        if last {
            self.outputs(ops, step)?;
        }
        Ok(())
    }

    /// The part of [`forward`](Self::forward) that every token goes through: up to the last norm.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn hidden(
        &mut self,
        ops: &mut O,
        step: &O::Step,
        layers: Range<usize>,
    ) -> Result<(), O::Error> {
        let (weights, a) = (&self.weights, &mut self.arena);
        if layers.start == 0 {
            let scale = self.config.embedding_scale;
            ops.embed(step, &weights.embedding, scale, &mut a.residual)?;
        }
        let last = layers.end == weights.layers.len();
        for i in layers {
            let (w, activation) = (&weights.layers[i], self.config.activation);
            // A block's output is added by the next block's norm: one pass over memory, not two.
            let before = i.checked_sub(1).map(|i| &weights.layers[i]);
            let delta = before.map(|w| (&a.delta, w.ffn_post_norm.as_ref()));
            ops.add_rms_norm(step, delta, &mut a.residual, &w.attn_norm, &mut a.normed)?;
            Self::attention(ops, step, i, w, a)?;
            let delta = Some((&a.delta, w.attn_post_norm.as_ref()));
            ops.add_rms_norm(step, delta, &mut a.residual, &w.ffn_norm, &mut a.normed)?;
            ops.gated_linear(step, &w.gate_up, activation, &a.normed, &mut a.gated)?;
            ops.linear(step, &w.down, &a.gated, &mut a.delta)?;
        }
        if last {
            let before = weights.layers.last();
            let delta = before.map(|w| (&a.delta, w.ffn_post_norm.as_ref()));
            let norm = &weights.final_norm;
            ops.add_rms_norm(step, delta, &mut a.residual, norm, &mut a.normed)?;
        }
        Ok(())
    }

    /// The rest of it: logits and samples of the positions that want them.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn outputs(&mut self, ops: &mut O, step: &mut O::Step) -> Result<(), O::Error> {
        let normed = &self.arena.normed;
        ops.check(step, normed)?;
        let head = self.weights.head.as_ref();
        let head = head.unwrap_or(&self.weights.embedding);
        for tile in ops.logit_tiles(step) {
            ops.logits(step, tile, head, normed)?;
            ops.sample(step, tile)?;
        }
        Ok(())
    }

    fn attention(
        ops: &mut O,
        step: &O::Step,
        layer: usize,
        w: &LayerWeights<O::Matrix, O::Vector>,
        a: &mut Arena<O::Act>,
    ) -> Result<(), O::Error> {
        ops.linear(step, &w.qkv, &a.normed, &mut a.qkv)?;
        let norms = w.qk_norms.as_ref().map(|(q, k)| (q, k));
        ops.qk_norm_rope_append(step, layer, norms, &mut a.qkv)?;
        ops.attention(step, layer, &a.qkv, &mut a.attn)?;
        ops.linear(step, &w.attn_out, &a.attn, &mut a.delta)
    }
}
