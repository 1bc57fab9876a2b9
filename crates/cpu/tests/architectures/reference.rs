//! A transformer in float64, written for reading: one position after another, one head after
//! another, whole rows of the weights in memory. It shares with the code under test nothing but the
//! reading of files.

use std::collections::HashMap;

use spate_model::{Checkpoint, Gguf, quant};
use spate_types::TokenId;

/// What the file's tensors don't tell.
pub(crate) struct Reference {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) epsilon: f64,
    pub(crate) embedding_scale: f64,
    /// Scores are multiplied by it.
    pub(crate) attention_scale: f64,
    pub(crate) activation: fn(f64) -> f64,
    /// Whether neighbours turn together; otherwise halves do.
    pub(crate) interleaved: bool,
    /// One per layer.
    pub(crate) layers: Vec<Layer>,
}

/// How a layer's attention sees positions.
#[derive(Clone)]
pub(crate) struct Layer {
    /// Positions that a query sees, its own included.
    pub(crate) window: usize,
    /// Radians per position of each pair.
    pub(crate) inverse_frequencies: Vec<f64>,
    /// Factor of rotated elements.
    pub(crate) magnitude: f64,
}

/// `[rows][columns]`; a vector is one row.
type Matrix = Vec<Vec<f64>>;

/// All tensors of a file of float32 tensors.
pub(crate) struct Tensors(HashMap<String, Matrix>);

impl Tensors {
    pub(crate) fn read(gguf: &Gguf) -> Self {
        let tensors = gguf.tensors().iter().map(|info| {
            let mut bytes = Vec::new();
            gguf.read(info, &mut bytes).unwrap();
            let mut values = vec![0.0; info.dims.iter().product::<u64>() as usize];
            quant::dequantize(info.ggml_type, &bytes, &mut values).unwrap();
            let rows = values.chunks_exact(info.dims[0] as usize);
            let rows = rows.map(|row| row.iter().copied().map(f64::from).collect());
            (info.name.clone(), rows.collect())
        });
        Self(tensors.collect())
    }

    fn vector(&self, name: &str) -> Option<&[f64]> {
        Some(&self.0.get(name)?[0])
    }

    /// Weight times `x`, plus bias, of the tensor `<name>.weight`.
    fn linear(&self, name: &str, x: &[f64]) -> Option<Vec<f64>> {
        let weight = self.0.get(&format!("{name}.weight"))?;
        let bias = self.vector(&format!("{name}.bias"));
        let row = |(i, row): (usize, &Vec<f64>)| dot(row, x) + bias.map_or(0.0, |bias| bias[i]);
        Some(weight.iter().enumerate().map(row).collect())
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

pub(crate) fn gelu_tanh(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

/// 1 / base^(2i / dims).
pub(crate) fn plain_frequencies(dims: usize, base: f64) -> Vec<f64> {
    let pairs = (0..dims / 2).map(|i| 2.0 * i as f64 / dims as f64);
    pairs.map(|exponent| 1.0 / base.powf(exponent)).collect()
}

impl Reference {
    /// Natural logarithms of the probabilities of all tokens, after each of `tokens`.
    pub(crate) fn logprobs(&self, t: &Tensors, tokens: &[TokenId]) -> Vec<Vec<f64>> {
        let embedding = &t.0["token_embd.weight"];
        let mut stream: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&token| {
                let row = embedding[token as usize].iter();
                row.map(|x| x * self.embedding_scale).collect()
            })
            .collect();
        for (i, layer) in self.layers.iter().enumerate() {
            let name = |suffix: &str| format!("blk.{i}.{suffix}");
            let attended = self.attention(t, layer, &name, &stream);
            for (x, delta) in stream.iter_mut().zip(attended) {
                self.add(t, &name("post_attention_norm.weight"), x, delta);
                let normed = self.norm(t, &name("ffn_norm.weight"), x);
                let (gate, up) = match t.linear(&name("ffn_gate"), &normed) {
                    Some(gate) => (gate, t.linear(&name("ffn_up"), &normed).unwrap()),
                    None => {
                        let mut both = t.linear(&name("ffn_up"), &normed).unwrap();
                        let up = both.split_off(both.len() / 2);
                        (both, up)
                    }
                };
                let gated = gate.iter().zip(&up).map(|(&g, u)| (self.activation)(g) * u);
                let gated: Vec<f64> = gated.collect();
                let delta = t.linear(&name("ffn_down"), &gated).unwrap();
                self.add(t, &name("post_ffw_norm.weight"), x, delta);
            }
        }
        let logits = stream.iter().map(|x| {
            let x = self.norm(t, "output_norm.weight", x);
            let tied = || t.linear("token_embd", &x);
            t.linear("output", &x).or_else(tied).unwrap()
        });
        logits.map(|logits| log_softmax(&logits)).collect()
    }

    /// The attention block's output for each position.
    fn attention(
        &self,
        t: &Tensors,
        layer: &Layer,
        name: &dyn Fn(&str) -> String,
        stream: &[Vec<f64>],
    ) -> Vec<Vec<f64>> {
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (position, x) in stream.iter().enumerate() {
            let normed = self.norm(t, &name("attn_norm.weight"), x);
            let (q, k, v) = match t.linear(&name("attn_q"), &normed) {
                Some(q) => (
                    q,
                    t.linear(&name("attn_k"), &normed).unwrap(),
                    t.linear(&name("attn_v"), &normed).unwrap(),
                ),
                None => {
                    let mut q = t.linear(&name("attn_qkv"), &normed).unwrap();
                    let mut k = q.split_off(self.heads * self.head_dim);
                    let v = k.split_off(self.kv_heads * self.head_dim);
                    (q, k, v)
                }
            };
            let rotated = |x: Vec<f64>, norm: &str| -> Vec<f64> {
                let heads = x.chunks_exact(self.head_dim);
                heads
                    .flat_map(|head| {
                        let head = match t.vector(norm) {
                            Some(_) => self.norm(t, norm, head),
                            None => head.to_vec(),
                        };
                        self.rotate(layer, &head, position)
                    })
                    .collect()
            };
            queries.push(rotated(q, &name("attn_q_norm.weight")));
            keys.push(rotated(k, &name("attn_k_norm.weight")));
            values.push(v);
        }
        let outputs = (0..stream.len()).map(|position| {
            let first = (position + 1).saturating_sub(layer.window);
            let heads = (0..self.heads).flat_map(|head| {
                let own = head * self.head_dim..(head + 1) * self.head_dim;
                let kv_head = head / (self.heads / self.kv_heads);
                let kv = kv_head * self.head_dim..(kv_head + 1) * self.head_dim;
                let query = &queries[position][own];
                let seen = first..=position;
                let scores: Vec<f64> = seen
                    .clone()
                    .map(|p| dot(query, &keys[p][kv.clone()]) * self.attention_scale)
                    .collect();
                let weights: Vec<f64> = log_softmax(&scores).iter().map(|w| w.exp()).collect();
                let mut out = vec![0.0; self.head_dim];
                for (p, weight) in seen.zip(weights) {
                    let value = &values[p][kv.clone()];
                    out.iter_mut()
                        .zip(value)
                        .for_each(|(o, v)| *o += weight * v);
                }
                out
            });
            t.linear(&name("attn_output"), &heads.collect::<Vec<_>>())
                .unwrap()
        });
        outputs.collect()
    }

    fn rotate(&self, layer: &Layer, head: &[f64], position: usize) -> Vec<f64> {
        let mut out = head.to_vec();
        let pairs = layer.inverse_frequencies.len();
        for (i, frequency) in layer.inverse_frequencies.iter().enumerate() {
            let (a, b) = if self.interleaved {
                (2 * i, 2 * i + 1)
            } else {
                (i, i + pairs)
            };
            let angle = position as f64 * frequency;
            let (sin, cos) = (angle.sin() * layer.magnitude, angle.cos() * layer.magnitude);
            out[a] = head[a] * cos - head[b] * sin;
            out[b] = head[b] * cos + head[a] * sin;
        }
        out
    }

    fn norm(&self, t: &Tensors, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = t.vector(name).unwrap();
        let mean_square = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean_square + self.epsilon).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }

    /// Adds a block's output to the stream, normalised if there is a norm of that name.
    fn add(&self, t: &Tensors, norm: &str, x: &mut [f64], delta: Vec<f64>) {
        let delta = match t.vector(norm) {
            Some(_) => self.norm(t, norm, &delta),
            None => delta,
        };
        x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
    }
}

fn log_softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| x - max - sum.ln()).collect()
}
