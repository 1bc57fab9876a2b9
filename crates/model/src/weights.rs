use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use crate::quant::dequantize;
use crate::{Checkpoint, Loader, MatrixPart, MatrixSource, ModelConfig, ModelError, TensorInfo};

#[cfg(test)]
mod tests;

/// All weights of a model, in a backend's form.
#[derive(Debug, Clone)]
pub struct Weights<M, V> {
    /// Token embeddings `[vocab, hidden]`.
    pub embedding: M,
    /// The transformer blocks.
    pub layers: Vec<LayerWeights<M, V>>,
    /// Norm before the output head.
    pub final_norm: V,
    /// Output head `[vocab, hidden]`; absent when it is the embedding table.
    pub head: Option<M>,
}

/// The weights of one transformer block.
#[derive(Debug, Clone)]
pub struct LayerWeights<M, V> {
    /// Norm before attention.
    pub attn_norm: V,
    /// Query, key and value projections, stacked.
    pub qkv: M,
    /// Norms of query and key heads.
    pub qk_norms: Option<(V, V)>,
    /// Attention output projection.
    pub attn_out: M,
    /// Norm of the attention block's output.
    pub attn_post_norm: Option<V>,
    /// Norm before the feed-forward block.
    pub ffn_norm: V,
    /// Gate and up projections, stacked.
    pub gate_up: M,
    /// Down projection.
    pub down: M,
    /// Norm of the feed-forward block's output.
    pub ffn_post_norm: Option<V>,
}

/// Why loading failed.
#[derive(Debug, thiserror::Error)]
pub enum LoadError<E> {
    /// The file is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The backend is at fault.
    #[error("{0}")]
    Backend(E),
}

/// Tensors of GGUF files that belong to the configuration: divisors of the rotary frequencies, one
/// per pair.
pub(crate) mod rope_tensor {
    /// Llama 3's.
    pub(crate) const DIVISORS: &str = "rope_freqs.weight";
    /// LongRoPE's for short contexts.
    pub(crate) const SHORT: &str = "rope_factors_short.weight";
    /// LongRoPE's for long contexts.
    pub(crate) const LONG: &str = "rope_factors_long.weight";
}

/// Checks that every tensor is there, has the shape that `config` says, and that there is none that
/// nobody would use (ignoring one would silently give wrong results).
///
/// # Errors
/// As said.
pub fn check_tensors(model: &dyn Checkpoint, config: &ModelConfig) -> Result<(), ModelError> {
    Plan::new(model, config).map(|_| ())
}

impl<M: Send, V: Send> Weights<M, V> {
    /// Reads all weights on `threads` threads, after [`check_tensors`]. Calls `progress` with the
    /// share of bytes done.
    ///
    /// # Errors
    /// When the check, a read or the backend fails.
    pub fn load<L>(
        model: &dyn Checkpoint,
        config: &ModelConfig,
        loader: &L,
        threads: usize,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self, LoadError<L::Error>>
    where
        L: Loader<Matrix = M, Vector = V>,
    {
        let plan = Plan::new(model, config)?;
        // The largest tables first, so that no thread is left with one of them at the end.
        let mut jobs: Vec<Job> = vec![Job::Matrix(&plan.embedding)];
        jobs.extend(plan.head.as_ref().map(Job::Matrix));
        jobs.push(Job::Vector(plan.final_norm));
        jobs.extend(plan.layers.iter().map(Job::Layer));
        let total: usize = jobs.iter().map(Job::bytes).sum();

        let next = AtomicUsize::new(0);
        let (sender, receiver) = mpsc::channel();
        let mut done: Vec<Option<Loaded<M, V>>> = jobs.iter().map(|_| None).collect();
        std::thread::scope(|scope| {
            for _ in 0..threads.clamp(1, jobs.len()) {
                let (sender, next, jobs) = (sender.clone(), &next, &jobs);
                scope.spawn(move || {
                    while let Some((i, job)) = {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        jobs.get(i).map(|job| (i, job))
                    } {
                        let loaded = job.run(model, loader);
                        let failed = loaded.is_err();
                        // The receiver leaves early only after another job's failure.
                        if sender.send((i, loaded)).is_err() || failed {
                            next.store(jobs.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
            drop(sender);
            let mut bytes = 0;
            for (i, loaded) in receiver {
                done[i] = Some(loaded?);
                bytes += jobs[i].bytes();
                progress(bytes as f32 / total as f32);
            }
            Ok::<_, LoadError<L::Error>>(())
        })?;
        let mut done = done.into_iter().flatten();
        Ok(assemble(&mut done, plan.head.is_some()))
    }
}

/// Puts finished jobs together, in the order in which they were listed.
fn assemble<M, V>(done: &mut impl Iterator<Item = Loaded<M, V>>, head: bool) -> Weights<M, V> {
    let mut matrix = || match done.next() {
        Some(Loaded::Matrix(m)) => m,
        _ => unreachable!("the first jobs are matrices"),
    };
    let embedding = matrix();
    let head = head.then(&mut matrix);
    let Some(Loaded::Vector(final_norm)) = done.next() else {
        unreachable!("the job after the matrices is a vector");
    };
    let layers = done
        .map(|loaded| match loaded {
            Loaded::Layer(layer) => *layer,
            _ => unreachable!("the remaining jobs are layers"),
        })
        .collect();
    Weights {
        embedding,
        layers,
        final_norm,
        head,
    }
}

enum Loaded<M, V> {
    Matrix(M),
    Vector(V),
    Layer(Box<LayerWeights<M, V>>),
}

type LoadedBy<L> =
    Result<Loaded<<L as Loader>::Matrix, <L as Loader>::Vector>, LoadError<<L as Loader>::Error>>;

enum Job<'a> {
    Matrix(&'a MatrixPlan<'a>),
    Vector(&'a TensorInfo),
    Layer(&'a LayerPlan<'a>),
}

impl Job<'_> {
    fn bytes(&self) -> usize {
        match self {
            Job::Matrix(m) => m.bytes(),
            Job::Vector(v) => v.bytes,
            Job::Layer(l) => [&l.qkv, &l.attn_out, &l.gate_up, &l.down]
                .map(MatrixPlan::bytes)
                .iter()
                .sum(),
        }
    }

    fn run<L: Loader>(&self, model: &dyn Checkpoint, loader: &L) -> LoadedBy<L> {
        let vector = |info| {
            let values = read_vector(model, info)?;
            loader.vector(&values).map_err(LoadError::Backend)
        };
        let optional = |info: Option<_>| info.map(vector).transpose();
        let matrix = |plan: &MatrixPlan| plan.load(model, loader);
        Ok(match self {
            Job::Matrix(plan) => Loaded::Matrix(matrix(plan)?),
            Job::Vector(info) => Loaded::Vector(vector(info)?),
            Job::Layer(plan) => Loaded::Layer(Box::new(LayerWeights {
                attn_norm: vector(plan.attn_norm)?,
                qkv: matrix(&plan.qkv)?,
                qk_norms: match plan.qk_norms {
                    Some((q, k)) => Some((vector(q)?, vector(k)?)),
                    None => None,
                },
                attn_out: matrix(&plan.attn_out)?,
                attn_post_norm: optional(plan.attn_post_norm)?,
                ffn_norm: vector(plan.ffn_norm)?,
                gate_up: matrix(&plan.gate_up)?,
                down: matrix(&plan.down)?,
                ffn_post_norm: optional(plan.ffn_post_norm)?,
            })),
        })
    }
}

/// Which tensors make the model; all shapes have been checked.
struct Plan<'a> {
    embedding: MatrixPlan<'a>,
    layers: Vec<LayerPlan<'a>>,
    final_norm: &'a TensorInfo,
    head: Option<MatrixPlan<'a>>,
}

struct LayerPlan<'a> {
    attn_norm: &'a TensorInfo,
    qkv: MatrixPlan<'a>,
    qk_norms: Option<(&'a TensorInfo, &'a TensorInfo)>,
    attn_out: MatrixPlan<'a>,
    attn_post_norm: Option<&'a TensorInfo>,
    ffn_norm: &'a TensorInfo,
    gate_up: MatrixPlan<'a>,
    down: MatrixPlan<'a>,
    ffn_post_norm: Option<&'a TensorInfo>,
}

struct MatrixPlan<'a> {
    cols: usize,
    /// Each with the rows of the maps that lie in it one after another.
    tensors: Vec<(&'a TensorInfo, Vec<usize>)>,
    /// One per tensor, or none.
    biases: Vec<&'a TensorInfo>,
}

impl<'a> Plan<'a> {
    fn new(model: &'a dyn Checkpoint, c: &ModelConfig) -> Result<Self, ModelError> {
        let mut finder = Finder {
            model,
            used: HashSet::new(),
        };
        let f = &mut finder;
        let plan = Self {
            embedding: f.matrix(&[("token_embd", &[c.vocab_size])], c.hidden)?,
            final_norm: f.vector("output_norm.weight", c.hidden)?,
            head: match model.tensor("output.weight") {
                Some(_) => Some(f.matrix(&[("output", &[c.vocab_size])], c.hidden)?),
                None => None,
            },
            layers: (0..c.layers)
                .map(|i| LayerPlan::new(f, c, i))
                .collect::<Result<_, _>>()?,
        };
        let rope = [rope_tensor::DIVISORS, rope_tensor::SHORT, rope_tensor::LONG];
        finder.used.extend(rope.map(str::to_owned));
        if let Some(t) = model
            .tensors()
            .iter()
            .find(|t| !finder.used.contains(&t.name))
        {
            return Err(model.error(format!(
                "tensor `{}` is not known for architecture `{}`",
                t.name, c.architecture
            )));
        }
        Ok(plan)
    }
}

impl<'a> LayerPlan<'a> {
    fn new(f: &mut Finder<'a>, c: &ModelConfig, layer: usize) -> Result<Self, ModelError> {
        let name = |suffix: &str| format!("blk.{layer}.{suffix}");
        let [q, k, v, qkv] = ["attn_q", "attn_k", "attn_v", "attn_qkv"].map(name);
        let [gate, up] = ["ffn_gate", "ffn_up"].map(name);
        let (q_width, kv_width) = (c.q_width(), c.kv_width());
        let norm = |f: &mut Finder<'a>, wanted: bool, suffix: &str, len: usize| {
            let find = || f.vector(&name(suffix), len);
            wanted.then(find).transpose()
        };
        let q_norm = norm(f, c.qk_norm, "attn_q_norm.weight", c.head_dim)?;
        let k_norm = norm(f, c.qk_norm, "attn_k_norm.weight", c.head_dim)?;
        // Phi 3 stores what reads the same input as one tensor, gate and up under the name of up.
        let qkv: &[(&str, &[usize])] = match f.rows(&qkv) {
            Some(_) => &[(&qkv, &[q_width, kv_width, kv_width])],
            None => &[(&q, &[q_width]), (&k, &[kv_width]), (&v, &[kv_width])],
        };
        let gate_up: &[(&str, &[usize])] = match f.rows(&up) {
            Some(rows) if rows == 2 * c.ffn as u64 => &[(&up, &[c.ffn, c.ffn])],
            _ => &[(&gate, &[c.ffn]), (&up, &[c.ffn])],
        };
        Ok(Self {
            attn_norm: f.vector(&name("attn_norm.weight"), c.hidden)?,
            qkv: f.matrix(qkv, c.hidden)?,
            qk_norms: q_norm.zip(k_norm),
            attn_out: f.matrix(&[(&name("attn_output"), &[c.hidden])], q_width)?,
            attn_post_norm: norm(f, c.post_norms, "post_attention_norm.weight", c.hidden)?,
            ffn_norm: f.vector(&name("ffn_norm.weight"), c.hidden)?,
            gate_up: f.matrix(gate_up, c.hidden)?,
            down: f.matrix(&[(&name("ffn_down"), &[c.hidden])], c.ffn)?,
            ffn_post_norm: norm(f, c.post_norms, "post_ffw_norm.weight", c.hidden)?,
        })
    }
}

impl MatrixPlan<'_> {
    fn bytes(&self) -> usize {
        self.tensors.iter().map(|(info, _)| info.bytes).sum()
    }

    fn load<L: Loader>(
        &self,
        model: &dyn Checkpoint,
        loader: &L,
    ) -> Result<L::Matrix, LoadError<L::Error>> {
        let mut bias = Vec::new();
        for info in &self.biases {
            bias.extend(read_vector(model, info)?);
        }
        let mut parts = Vec::new();
        for (tensor, maps) in &self.tensors {
            let row_bytes = tensor.bytes / maps.iter().sum::<usize>();
            let mut start = 0;
            for &rows in maps {
                let bytes = rows * row_bytes;
                parts.push(MatrixPart {
                    ggml_type: tensor.ggml_type,
                    rows,
                    bytes,
                    model,
                    tensor,
                    start,
                });
                start += bytes;
            }
        }
        let source = MatrixSource {
            cols: self.cols,
            parts,
            bias: (!self.biases.is_empty()).then_some(bias),
        };
        loader.matrix(source).map_err(LoadError::Backend)
    }
}

/// Looks tensors up, checks their shapes and remembers which were used.
struct Finder<'a> {
    model: &'a dyn Checkpoint,
    used: HashSet<String>,
}

impl<'a> Finder<'a> {
    fn find(&mut self, name: &str, dims: &[usize]) -> Result<&'a TensorInfo, ModelError> {
        let tensor = self
            .model
            .tensor(name)
            .ok_or_else(|| self.model.error(format!("tensor `{name}` is missing")))?;
        expect_dims(self.model, tensor, dims)?;
        self.used.insert(name.to_owned());
        Ok(tensor)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<&'a TensorInfo, ModelError> {
        self.find(name, &[len])
    }

    /// Rows of the matrix `<name>.weight`, if there is one.
    fn rows(&self, name: &str) -> Option<u64> {
        let tensor = self.model.tensor(&format!("{name}.weight"))?;
        tensor.dims.get(1).copied()
    }

    /// `<name>.weight` of each tensor, and either all or none of `<name>.bias`.
    fn matrix(
        &mut self,
        tensors: &[(&str, &[usize])],
        cols: usize,
    ) -> Result<MatrixPlan<'a>, ModelError> {
        let mut plan = MatrixPlan {
            cols,
            tensors: Vec::new(),
            biases: Vec::new(),
        };
        let biased = tensors
            .iter()
            .any(|(name, _)| self.model.tensor(&format!("{name}.bias")).is_some());
        for &(name, maps) in tensors {
            let rows = maps.iter().sum();
            let info = self.find(&format!("{name}.weight"), &[cols, rows])?;
            plan.tensors.push((info, maps.to_vec()));
            if biased {
                plan.biases
                    .push(self.find(&format!("{name}.bias"), &[rows])?);
            }
        }
        Ok(plan)
    }
}

fn expect_dims(
    model: &dyn Checkpoint,
    tensor: &TensorInfo,
    dims: &[usize],
) -> Result<(), ModelError> {
    if tensor
        .dims
        .iter()
        .copied()
        .eq(dims.iter().map(|&d| d as u64))
    {
        return Ok(());
    }
    Err(model.error(format!(
        "tensor `{}` has the dimensions {:?}, the configuration says {dims:?}",
        tensor.name, tensor.dims
    )))
}

pub(crate) fn read_vector(
    model: &dyn Checkpoint,
    tensor: &TensorInfo,
) -> Result<Vec<f32>, ModelError> {
    let mut bytes = Vec::new();
    model.read(tensor, &mut bytes)?;
    let mut values = vec![0.0; tensor.dims.iter().product::<u64>() as usize];
    dequantize(tensor.ggml_type, &bytes, &mut values)
        .map_err(|e| model.error(format!("tensor `{}`: {e}", tensor.name)))?;
    Ok(values)
}
