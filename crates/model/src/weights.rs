use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use crate::quant::dequantize;
use crate::{Checkpoint, Loader, MatrixPart, MatrixSource, ModelConfig, ModelError, TensorInfo};

#[cfg(test)]
mod tests;

/// All weights of a model, in a backend's form.
#[derive(Debug)]
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
#[derive(Debug)]
pub struct LayerWeights<M, V> {
    /// Norm before attention.
    pub attn_norm: V,
    /// Query, key and value projections, stacked.
    pub qkv: M,
    /// Norms of query and key heads.
    pub qk_norms: Option<(V, V)>,
    /// Attention output projection.
    pub attn_out: M,
    /// Norm before the feed-forward block.
    pub ffn_norm: V,
    /// Gate and up projections, stacked.
    pub gate_up: M,
    /// Down projection.
    pub down: M,
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

/// Factors by which Llama 3's long-context scaling divides the rotary frequencies, one per pair.
///
/// # Errors
/// When the tensor has a wrong shape or can't be read.
pub fn rope_factors(
    model: &dyn Checkpoint,
    config: &ModelConfig,
) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(tensor) = model.tensor(ROPE_FACTORS) else {
        return Ok(None);
    };
    expect_dims(model, tensor, &[config.rope.dims / 2])?;
    let factors = read_vector(model, tensor)?;
    if factors.iter().any(|f| !(*f > 0.0 && f.is_finite())) {
        return Err(model.error(format!(
            "`{ROPE_FACTORS}` has a factor that is not positive"
        )));
    }
    Ok(Some(factors))
}

/// The tensor of Llama 3's frequency factors.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

impl<M: Send, V: Send> Weights<M, V> {
    /// Reads all weights on `threads` threads, after checking that every tensor is there, has the
    /// shape that `config` says, and that the file holds no tensor that nobody would use (ignoring
    /// one would silently give wrong results). Calls `progress` with the share of bytes done.
    ///
    /// # Errors
    /// As said, and when a read or the backend fails.
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
                ffn_norm: vector(plan.ffn_norm)?,
                gate_up: matrix(&plan.gate_up)?,
                down: matrix(&plan.down)?,
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
    ffn_norm: &'a TensorInfo,
    gate_up: MatrixPlan<'a>,
    down: MatrixPlan<'a>,
}

struct MatrixPlan<'a> {
    cols: usize,
    parts: Vec<(&'a TensorInfo, usize)>,
    /// One per part, or none.
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
            embedding: f.matrix(&[("token_embd", c.vocab_size)], c.hidden)?,
            final_norm: f.vector("output_norm.weight", c.hidden)?,
            head: match model.tensor("output.weight") {
                Some(_) => Some(f.matrix(&[("output", c.vocab_size)], c.hidden)?),
                None => None,
            },
            layers: (0..c.layers)
                .map(|i| LayerPlan::new(f, c, i))
                .collect::<Result<_, _>>()?,
        };
        finder.used.insert(ROPE_FACTORS.to_owned());
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
        let [q, k, v] = ["attn_q", "attn_k", "attn_v"].map(name);
        let [gate, up] = ["ffn_gate", "ffn_up"].map(name);
        Ok(Self {
            attn_norm: f.vector(&name("attn_norm.weight"), c.hidden)?,
            qkv: f.matrix(
                &[(&q, c.q_width()), (&k, c.kv_width()), (&v, c.kv_width())],
                c.hidden,
            )?,
            qk_norms: if c.qk_norm {
                Some((
                    f.vector(&name("attn_q_norm.weight"), c.head_dim)?,
                    f.vector(&name("attn_k_norm.weight"), c.head_dim)?,
                ))
            } else {
                None
            },
            attn_out: f.matrix(&[(&name("attn_output"), c.hidden)], c.q_width())?,
            ffn_norm: f.vector(&name("ffn_norm.weight"), c.hidden)?,
            gate_up: f.matrix(&[(&gate, c.ffn), (&up, c.ffn)], c.hidden)?,
            down: f.matrix(&[(&name("ffn_down"), c.hidden)], c.ffn)?,
        })
    }
}

impl MatrixPlan<'_> {
    fn bytes(&self) -> usize {
        self.parts.iter().map(|(info, _)| info.bytes).sum()
    }

    fn load<L: Loader>(
        &self,
        model: &dyn Checkpoint,
        loader: &L,
    ) -> Result<L::Matrix, LoadError<L::Error>> {
        let mut bytes = Vec::with_capacity(self.bytes());
        for (info, _) in &self.parts {
            model.read(info, &mut bytes)?;
        }
        let mut bias = Vec::new();
        for info in &self.biases {
            bias.extend(read_vector(model, info)?);
        }
        let mut rest = bytes.as_slice();
        let parts = self.parts.iter().map(|&(info, rows)| {
            let (bytes, tail) = rest.split_at(info.bytes);
            rest = tail;
            MatrixPart {
                ggml_type: info.ggml_type,
                rows,
                bytes,
            }
        });
        let source = MatrixSource {
            cols: self.cols,
            parts: parts.collect(),
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

    /// `<name>.weight` of each part, and either all or none of `<name>.bias`.
    fn matrix(
        &mut self,
        parts: &[(&str, usize)],
        cols: usize,
    ) -> Result<MatrixPlan<'a>, ModelError> {
        let mut plan = MatrixPlan {
            cols,
            parts: Vec::new(),
            biases: Vec::new(),
        };
        let biased = parts
            .iter()
            .any(|(name, _)| self.model.tensor(&format!("{name}.bias")).is_some());
        for &(name, rows) in parts {
            let info = self.find(&format!("{name}.weight"), &[cols, rows])?;
            plan.parts.push((info, rows));
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

fn read_vector(model: &dyn Checkpoint, tensor: &TensorInfo) -> Result<Vec<f32>, ModelError> {
    let mut bytes = Vec::new();
    model.read(tensor, &mut bytes)?;
    let mut values = vec![0.0; tensor.dims.iter().product::<u64>() as usize];
    dequantize(tensor.ggml_type, &bytes, &mut values)
        .map_err(|e| model.error(format!("tensor `{}`: {e}", tensor.name)))?;
    Ok(values)
}
