//! Random weights for a model of which only the configuration is at hand: the speed and the memory of
//! a model, without its files.

use std::path::{Path, PathBuf};

use half::f16;

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
    fn read_at(&self, tensor: &TensorInfo, start: usize, out: &mut [u8]) -> Result<(), ModelError> {
        if let [_] = tensor.dims[..] {
            let value: f32 = match tensor.name.ends_with("bias") {
                true => 0.0,
                false => 1.0,
            };
            fill(start, out, |_| value.to_le_bytes());
            return Ok(());
        }
        let random = Uniform::new(self.seed, &tensor.name);
        let limit = (3.0 / tensor.dims[0] as f32).sqrt();
        match tensor.ggml_type {
            GgmlType::F16 => fill(start, out, |i| {
                to_bytes(random.four(i).map(|x| f16::from_f32(x * limit).to_bits()))
            }),
            GgmlType::BF16 => fill(start, out, |i| {
                to_bytes(random.four(i).map(|x| round_to_bf16(x * limit)))
            }),
            _ => fill(start, out, |i| (random.one(i) * limit).to_le_bytes()),
        }
        Ok(())
    }
}

/// The bytes from `start` on of an endless array; `group` gives the `N` bytes of each of its groups.
fn fill<const N: usize>(start: usize, out: &mut [u8], group: impl Fn(u64) -> [u8; N]) {
    let mut index = (start / N) as u64;
    let (head, rest) = out.split_at_mut((start.next_multiple_of(N) - start).min(out.len()));
    if !head.is_empty() {
        head.copy_from_slice(&group(index)[start % N..][..head.len()]);
        index += 1;
    }
    let (groups, tail) = rest.as_chunks_mut::<N>();
    for bytes in groups {
        *bytes = group(index);
        index += 1;
    }
    if !tail.is_empty() {
        tail.copy_from_slice(&group(index)[..tail.len()]);
    }
}

/// Of a finite number; half a place is rounded away from zero. The `half` crate's conversion, which knows
/// infinities and NaN, takes ten times as long.
fn round_to_bf16(x: f32) -> u16 {
    ((x.to_bits() + 0x8000) >> 16) as u16
}

fn to_bytes([a, b, c, d]: [u16; 4]) -> [u8; 8] {
    let number = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
    number.to_le_bytes()
}

/// Uniform numbers in -1 .. 1, each found by its index: splitmix64 (Steele, Lea & Flood 2014).
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

    fn bits(&self, index: u64) -> u64 {
        let step = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0.wrapping_add(step);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Of 24 bits.
    fn one(&self, index: u64) -> f32 {
        (self.bits(index).cast_signed() >> 40) as f32 / (1 << 23) as f32
    }

    /// Of 16 bits, more than numbers of 16 bits keep.
    fn four(&self, index: u64) -> [f32; 4] {
        let bits = self.bits(index);
        [0, 16, 32, 48].map(|shift| f32::from((bits >> shift) as i16) / 32768.0)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn parts_are_those_of_the_whole() {
        let random = Uniform::new(7, "blk.0.attn_q.weight");
        let group = |i| to_bytes(random.four(i).map(round_to_bf16));
        let mut whole = [0; 100];
        fill(0, &mut whole, group);
        for (start, len) in [(0, 8), (3, 2), (5, 40), (8, 0), (16, 16), (31, 69)] {
            let mut part = vec![0; len];
            fill(start, &mut part, group);
            assert_eq!(
                part,
                whole[start..start + len],
                "{len} bytes from {start} on"
            );
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        let random = Uniform::new(7, "blk.0.attn_q.weight");
        for x in (0..1000).flat_map(|i| random.four(i)) {
            assert!((-1.0..1.0).contains(&x));
            let error = (bf16::from_bits(round_to_bf16(x)).to_f32() - x).abs();
            assert!(error <= (bf16::from_f32(x).to_f32() - x).abs(), "{x}");
        }
    }
}
