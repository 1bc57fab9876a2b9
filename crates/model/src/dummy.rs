//! Random weights for a model of which only the configuration is at hand: the speed and the memory of
//! a model, without its files.

use std::path::{Path, PathBuf};

use half::{bf16, f16};

use crate::{Checkpoint, GgmlType, HfDirectory, ModelConfig, ModelError, TensorInfo};

/// Random weights; the same seed gives the same ones.
#[derive(Debug)]
pub struct DummyModel {
    path: PathBuf,
    config: ModelConfig,
    seed: u64,
    tensors: Vec<TensorInfo>,
}

impl DummyModel {
    /// A model of the architecture, shape and number format that a directory's `config.json` says.
    ///
    /// # Errors
    /// When a tensor would be too large for this machine's addresses.
    pub fn new(directory: &HfDirectory, seed: u64) -> Result<Self, ModelError> {
        let mut model = Self {
            path: directory.path().to_owned(),
            config: directory.config().clone(),
            seed,
            tensors: Vec::new(),
        };
        let matrices = directory.dtype();
        for (name, dims) in directory.expected_tensors() {
            // Norms and biases are a thousandth of the weights.
            let ggml_type = if dims.len() == 1 {
                GgmlType::F32
            } else {
                matrices
            };
            let bytes = dims
                .iter()
                .try_fold(ggml_type.block_bytes(), |bytes, &d| bytes.checked_mul(d))
                .ok_or_else(|| {
                    let problem = format!("tensor `{name}` of {dims:?} is too large");
                    (&model as &dyn Checkpoint).error(problem)
                })?;
            model.tensors.push(TensorInfo {
                name,
                dims: dims.into_iter().map(|d| d as u64).collect(),
                ggml_type,
                file: 0,
                offset: 0,
                bytes,
            });
        }
        Ok(model)
    }
}

impl Checkpoint for DummyModel {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> Result<ModelConfig, ModelError> {
        Ok(self.config.clone())
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Norms are one and biases zero. Matrices are uniform with a variance of one over their
    /// columns: whatever is as large as a norm leaves it, comes out as large.
    fn read(&self, tensor: &TensorInfo, out: &mut Vec<u8>) -> Result<(), ModelError> {
        if let [_] = tensor.dims[..] {
            let value: f32 = match tensor.name.ends_with("bias") {
                true => 0.0,
                false => 1.0,
            };
            fill(out, tensor.bytes, || value.to_le_bytes());
            return Ok(());
        }
        let mut random = Uniform::new(self.seed, &tensor.name);
        let limit = (3.0 / tensor.dims[0] as f32).sqrt();
        let mut next = || random.next() * limit;
        match tensor.ggml_type {
            GgmlType::F16 => fill(out, tensor.bytes, || f16::from_f32(next()).to_le_bytes()),
            GgmlType::BF16 => fill(out, tensor.bytes, || bf16::from_f32(next()).to_le_bytes()),
            _ => fill(out, tensor.bytes, || next().to_le_bytes()),
        }
        Ok(())
    }
}

/// Appends `bytes` bytes, `N` at a time.
fn fill<const N: usize>(out: &mut Vec<u8>, bytes: usize, mut next: impl FnMut() -> [u8; N]) {
    let start = out.len();
    out.resize(start + bytes, 0);
    for number in out[start..].as_chunks_mut::<N>().0 {
        *number = next();
    }
}

/// Uniform numbers in -1 .. 1 from splitmix64 (Steele, Lea & Flood 2014).
struct Uniform(u64);

impl Uniform {
    /// Streams of different names are different ones.
    fn new(seed: u64, name: &str) -> Self {
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(hash ^ seed)
    }

    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // The upper 24 bits, signed.
        ((z ^ (z >> 31)).cast_signed() >> 40) as f32 / (1 << 23) as f32
    }
}
