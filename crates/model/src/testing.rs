//! Small random models for tests, written as real GGUF files.

pub mod hf;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use half::f16;

use crate::GgmlType;
use crate::quant::dequantize;

/// Builds the bytes of a GGUF file.
#[derive(Debug, Default, Clone)]
pub struct GgufBuilder {
    pairs: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufBuilder {
    const ALIGNMENT: usize = 32;

    /// Adds a pair whose value is given as it stands in the file: type, then payload.
    pub fn raw(&mut self, key: &str, kind: u32, payload: &[u8]) -> &mut Self {
        let value = [&kind.to_le_bytes(), payload].concat();
        self.pairs.push((key.to_owned(), value));
        self
    }

    /// Adds an integer.
    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    /// Adds a float.
    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    /// Adds a truth value.
    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, 7, &[value.into()])
    }

    /// Adds a string.
    pub fn str(&mut self, key: &str, value: &str) -> &mut Self {
        self.raw(key, 8, &string(value))
    }

    /// Adds an array of strings.
    pub fn strs(&mut self, key: &str, values: &[String]) -> &mut Self {
        let items: Vec<u8> = values.iter().flat_map(|s| string(s)).collect();
        self.array(key, 8, values.len() as u64, &items)
    }

    /// Adds an array of integers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let items: Vec<u8> = values.iter().flat_map(|i| i.to_le_bytes()).collect();
        self.array(key, 5, values.len() as u64, &items)
    }

    /// Adds an array of `count` elements of type `kind`.
    pub fn array(&mut self, key: &str, kind: u32, count: u64, items: &[u8]) -> &mut Self {
        let payload = [&kind.to_le_bytes(), count.to_le_bytes().as_slice(), items].concat();
        self.raw(key, 9, &payload)
    }

    /// Adds a tensor; `dims` with the contiguous dimension first.
    pub fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, bytes: Vec<u8>) -> &mut Self {
        self.tensors
            .push((name.to_owned(), dims.to_vec(), kind, bytes));
        self
    }

    /// Removes a pair or a tensor, so that another can take its place.
    pub fn without(&mut self, name: &str) -> &mut Self {
        self.pairs.retain(|p| p.0 != name);
        self.tensors.retain(|t| t.0 != name);
        self
    }

    /// Adds a tensor of one of the types that [`quantize`] can write.
    pub fn floats(
        &mut self,
        name: &str,
        dims: &[u64],
        kind: GgmlType,
        values: &[f32],
    ) -> &mut Self {
        self.tensor(name, dims, number(kind), quantize(kind, values))
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            out.extend(string(key));
            out.extend(value);
        }
        let mut data = Vec::new();
        for (name, dims, kind, bytes) in &self.tensors {
            data.resize(usize::next_multiple_of(data.len(), Self::ALIGNMENT), 0);
            out.extend(string(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(Self::ALIGNMENT), 0);
        out.extend(data);
        out
    }
}

/// What a type is called in a file.
fn number(kind: GgmlType) -> u32 {
    let mut numbers = 0..64;
    let number = numbers.find(|&id| GgmlType::from_u32(id) == Ok(kind));
    number.expect("every type has a number")
}

fn string(s: &str) -> Vec<u8> {
    [(s.len() as u64).to_le_bytes().as_slice(), s.as_bytes()].concat()
}

/// A file that is removed when this is dropped.
#[derive(Debug)]
pub struct TempFile(PathBuf);

impl TempFile {
    /// Writes `bytes` to a new file.
    ///
    /// # Panics
    /// When the temporary directory can't be written.
    pub fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("spate-test-{}-{n}.gguf", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).expect("the temporary directory is writable");
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        // Nothing depends on it: a leftover in the temporary directory is no failure.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Shape of a random model. The default, a llama, takes a few hundred kilobytes.
#[derive(Debug, Clone)]
pub struct TinyLlama {
    /// One of [`crate::ARCHITECTURES`].
    pub architecture: &'static str,
    /// Of the random weights.
    pub seed: u64,
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the residual stream; a multiple of 32.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Inner width of the feed-forward block; a multiple of 32.
    pub ffn: u32,
    /// Longest sequence.
    pub context_len: u32,
    /// Format of the matrices: F32, F16, Q4_1, Q8_0, Q2_K, Q3_K, IQ4_NL or IQ4_XS.
    pub weights: GgmlType,
    /// Format of the value projection, to have stacked matrices of mixed formats (not for `phi3`,
    /// whose projections are one tensor).
    pub value_weights: GgmlType,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Whether query, key and value projections have a bias (not for `phi3`).
    pub bias: bool,
    /// Sliding window; of every layer but each third for `gemma3`, of all for others.
    pub window: Option<u32>,
    /// Llama 3's frequency factors.
    pub rope_factors: bool,
    /// A token whose embedding is not a number; needs float weights.
    pub nan_token: Option<u32>,
}

impl Default for TinyLlama {
    fn default() -> Self {
        Self {
            architecture: "llama",
            seed: 1,
            layers: 2,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: 96,
            context_len: 512,
            weights: GgmlType::Q4_1,
            value_weights: GgmlType::Q8_0,
            tied: false,
            bias: false,
            window: None,
            rope_factors: false,
            nan_token: None,
        }
    }
}

/// Special tokens behind the 256 byte tokens of [`tiny_llama`]'s vocabulary.
pub const TINY_SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// A random model with a byte-level vocabulary (byte `b` is token `b`, then [`TINY_SPECIALS`]) and
/// a ChatML template, as the bytes of a GGUF file.
pub fn tiny_llama(spec: &TinyLlama) -> Vec<u8> {
    tiny_llama_builder(spec).build()
}

/// [`tiny_llama`], not yet built.
pub fn tiny_llama_builder(spec: &TinyLlama) -> GgufBuilder {
    let mut g = GgufBuilder::default();
    let tokens: Vec<String> = byte_tokens()
        .map(String::from)
        .chain(TINY_SPECIALS.map(String::from))
        .collect();
    let types: Vec<i32> = (0..tokens.len())
        .map(|i| if i < 256 { 1 } else { 3 })
        .collect();
    let key = |name: &str| format!("{}.{name}", spec.architecture);
    g.str("general.architecture", spec.architecture)
        .str("general.name", "tiny random model")
        .u32(&key("block_count"), spec.layers)
        .u32(&key("context_length"), spec.context_len)
        .u32(&key("embedding_length"), spec.hidden)
        .u32(&key("feed_forward_length"), spec.ffn)
        .u32(&key("attention.head_count"), spec.heads)
        .u32(&key("attention.head_count_kv"), spec.kv_heads)
        .u32(&key("attention.key_length"), spec.head_dim)
        .u32(&key("attention.value_length"), spec.head_dim)
        .u32(&key("rope.dimension_count"), spec.head_dim)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", "smollm")
        .strs("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &types)
        .strs("tokenizer.ggml.merges", &[])
        .u32("tokenizer.ggml.bos_token_id", 257)
        .u32("tokenizer.ggml.eos_token_id", 258)
        .str("tokenizer.chat_template", CHATML);
    if let Some(window) = spec.window {
        g.u32(&key("attention.sliding_window"), window);
    }
    if spec.architecture == "gemma3" {
        g.u32(&key("attention.sliding_window_pattern"), 3);
    }
    tiny_weights(spec, tokens.len() as u64, &mut g);
    g
}

fn tiny_weights(spec: &TinyLlama, vocab: u64, g: &mut GgufBuilder) {
    let mut rng = Normal(spec.seed ^ 0x9e37_79b9_7f4a_7c15);
    let mut matrix = |g: &mut GgufBuilder, name: &str, cols: u64, rows: u64, kind: GgmlType| {
        // Unit variance of the outputs for unit variance of the inputs, times two: random weights
        // of that size give logits that differ clearly.
        let scale = 2.0 / (cols as f32).sqrt();
        if let Some(factors) = factors(kind) {
            let bytes = random_blocks(kind, factors, (cols * rows) as usize, scale, &mut rng);
            g.tensor(
                &format!("{name}.weight"),
                &[cols, rows],
                number(kind),
                bytes,
            );
            return;
        }
        let mut values: Vec<f32> = (0..cols * rows).map(|_| rng.next() * scale).collect();
        if let (Some(token), "token_embd") = (spec.nan_token, name) {
            values[token as usize * cols as usize..][..cols as usize].fill(f32::NAN);
        }
        g.floats(&format!("{name}.weight"), &[cols, rows], kind, &values);
    };
    let vector = |g: &mut GgufBuilder, name: &str, len: u64, value: f32| {
        let values = vec![value; len as usize];
        g.floats(name, &[len], GgmlType::F32, &values);
    };
    let mut norms = Normal(spec.seed);
    let mut norm = |g: &mut GgufBuilder, name: &str, len: u64| {
        let values: Vec<f32> = (0..len).map(|_| 1.0 + 0.1 * norms.next()).collect();
        g.floats(&format!("{name}.weight"), &[len], GgmlType::F32, &values);
    };
    let [h, ffn, dim] = [spec.hidden, spec.ffn, spec.head_dim].map(u64::from);
    let (q, kv) = (u64::from(spec.heads) * dim, u64::from(spec.kv_heads) * dim);
    let kind = spec.weights;
    matrix(g, "token_embd", h, vocab, kind);
    if !spec.tied {
        matrix(g, "output", h, vocab, kind);
    }
    norm(g, "output_norm", h);
    if spec.rope_factors {
        vector(g, "rope_freqs.weight", dim / 2, 1.5);
    }
    for i in 0..spec.layers {
        let name = |suffix: &str| format!("blk.{i}.{suffix}");
        norm(g, &name("attn_norm"), h);
        norm(g, &name("ffn_norm"), h);
        if spec.architecture == "phi3" {
            matrix(g, &name("attn_qkv"), h, q + 2 * kv, kind);
            matrix(g, &name("ffn_up"), h, 2 * ffn, kind);
        } else {
            matrix(g, &name("attn_q"), h, q, kind);
            matrix(g, &name("attn_k"), h, kv, kind);
            matrix(g, &name("attn_v"), h, kv, spec.value_weights);
            matrix(g, &name("ffn_gate"), h, ffn, kind);
            matrix(g, &name("ffn_up"), h, ffn, kind);
        }
        matrix(g, &name("attn_output"), q, h, kind);
        matrix(g, &name("ffn_down"), ffn, h, kind);
        if spec.bias {
            vector(g, &name("attn_q.bias"), q, 0.25);
            vector(g, &name("attn_k.bias"), kv, -0.25);
            vector(g, &name("attn_v.bias"), kv, 0.5);
        }
        if matches!(spec.architecture, "qwen3" | "gemma3") {
            norm(g, &name("attn_q_norm"), dim);
            norm(g, &name("attn_k_norm"), dim);
        }
        if spec.architecture == "gemma3" {
            norm(g, &name("post_attention_norm"), h);
            norm(g, &name("post_ffw_norm"), h);
        }
    }
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// GPT-2's printable stand-ins for the 256 bytes, in order of the bytes.
fn byte_tokens() -> impl Iterator<Item = char> {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    (0..256).map(move |b| {
        let code = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).expect("codes below 0x200 are characters")
    })
}

/// Roughly normal numbers: the sum of twelve uniform ones (splitmix64).
struct Normal(u64);

impl Normal {
    fn next(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    }
}

/// Of formats without a quantiser here: where a block has its half-precision factors, and how large they are
/// beside each other for weights whose mean is about zero.
fn factors(kind: GgmlType) -> Option<&'static [(usize, f32)]> {
    match kind {
        GgmlType::Q2K => Some(&[(80, 1.0), (82, 1.5)]),
        GgmlType::Q3K => Some(&[(108, 1.0)]),
        GgmlType::Iq4Nl | GgmlType::Iq4Xs => Some(&[(0, 1.0)]),
        _ => None,
    }
}

/// Random bits under factors that make weights of this root mean square.
fn random_blocks(
    kind: GgmlType,
    factors: &[(usize, f32)],
    len: usize,
    size: f32,
    rng: &mut Normal,
) -> Vec<u8> {
    let bytes = len / kind.block_elems() * kind.block_bytes();
    let mut bytes: Vec<u8> = (0..bytes).map(|_| (rng.uniform() * 256.0) as u8).collect();
    let scale_by = |bytes: &mut [u8], by: f32| {
        for block in bytes.chunks_exact_mut(kind.block_bytes()) {
            for &(at, factor) in factors {
                block[at..at + 2].copy_from_slice(&f16::from_f32(factor * by).to_le_bytes());
            }
        }
    };
    scale_by(&mut bytes, 1.0);
    let mut values = vec![0.0; len];
    dequantize(kind, &bytes, &mut values).expect("whole blocks");
    let square = values.iter().map(|v| v * v).sum::<f32>() / len as f32;
    scale_by(&mut bytes, size / square.sqrt());
    bytes
}

/// Writes `values` in a block format, rounding to the nearest step between each block's extremes.
///
/// # Panics
/// For formats other than F32, F16, Q4_1 and Q8_0, and when the last block is not full.
pub fn quantize(kind: GgmlType, values: &[f32]) -> Vec<u8> {
    let blocks = values.chunks(32);
    match kind {
        GgmlType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        GgmlType::F16 => values
            .iter()
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect(),
        GgmlType::Q4_1 => blocks.flat_map(q4_1).collect(),
        GgmlType::Q8_0 => blocks.flat_map(q8_0).collect(),
        other => panic!("no test quantiser for {other:?}"),
    }
}

fn q4_1(block: &[f32]) -> Vec<u8> {
    assert_eq!(block.len(), 32, "a Q4_1 block has 32 elements");
    let min = block.iter().copied().fold(f32::INFINITY, f32::min);
    let max = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let step = (max - min) / 15.0;
    let level = |v: f32| ((v - min) / step).round().clamp(0.0, 15.0) as u8;
    let mut out = Vec::with_capacity(20);
    out.extend(f16::from_f32(step).to_le_bytes());
    out.extend(f16::from_f32(min).to_le_bytes());
    out.extend((0..16).map(|i| level(block[i]) | level(block[i + 16]) << 4));
    out
}

fn q8_0(block: &[f32]) -> Vec<u8> {
    assert_eq!(block.len(), 32, "a Q8_0 block has 32 elements");
    let step = block.iter().fold(0.0, |m: f32, v| m.max(v.abs())) / 127.0;
    let mut out = Vec::with_capacity(34);
    out.extend(f16::from_f32(step).to_le_bytes());
    out.extend(block.iter().map(|v| (v / step).round() as i8 as u8));
    out
}
