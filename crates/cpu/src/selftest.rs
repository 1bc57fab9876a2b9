//! Whether this machine computes right, and how fast: for users as well as for tests.

use std::time::Instant;

use half::f16;
use spate_model::quant::{GgmlType, dequantize};

use crate::CpuError;
use crate::linear::{Isa, LinearWeight, Scratch, linear};
use crate::pool::ThreadPool;

/// What a check found.
#[derive(Debug, Clone)]
pub struct Report {
    /// Instruction set and format of the weights.
    pub name: String,
    /// ‖out − reference‖ / ‖reference‖, the reference in float64.
    pub error: f64,
    /// The largest that passes.
    pub limit: f64,
    /// Whether every bit is that of plain Rust.
    pub same_bits: bool,
}

impl Report {
    /// Whether the products are right. An error that is not a number fails.
    pub fn passed(&self) -> bool {
        self.error <= self.limit && self.same_bits
    }
}

/// What the CPU was seen to do, per second.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Bytes of weights that a single token's product reads.
    pub read: f64,
    /// Multiplications and additions with 8-bit weights for many tokens.
    pub matrix: f64,
}

/// Rounding of float32 sums; activations of eight bits.
const LIMIT_FLOAT: f64 = 1e-5;
const LIMIT_INT8: f64 = 0.02;

const ROWS: usize = 100;
const COLS: usize = 1024;
const TOKENS: usize = 5;

/// Multiplies with weights of several formats on every instruction set that the CPU has, against
/// float64, and bit for bit against plain Rust.
///
/// # Errors
/// When the system has no thread left.
pub fn run(seed: u64) -> Result<Vec<Report>, CpuError> {
    let pool = ThreadPool::new(2).map_err(CpuError::Thread)?;
    let mut random = Random(seed);
    let mut reports = Vec::new();
    for (ty, limit) in [
        (GgmlType::F32, LIMIT_FLOAT),
        (GgmlType::BF16, LIMIT_FLOAT),
        (GgmlType::Q8_0, LIMIT_INT8),
        (GgmlType::Q4_0, LIMIT_INT8),
    ] {
        let bytes = random.weights(ty, ROWS * COLS);
        let weight = LinearWeight::fast(ty, (ROWS, COLS), &bytes, &pool)?;
        let x: Vec<f32> = (0..TOKENS * COLS).map(|_| random.signed()).collect();
        let want = reference(ty, &bytes, &x)?;
        let mut scalar: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; TOKENS * ROWS];
            let mut scratch = Scratch::with_isa(isa, TOKENS, COLS);
            linear(&pool, &[&weight], &x, TOKENS, &mut [&mut out], &mut scratch);
            let scalar = scalar.get_or_insert_with(|| out.clone());
            reports.push(Report {
                name: format!("{}, {}", isa.name(), ty.name()),
                error: distance(&out, &want),
                limit,
                same_bits: scalar
                    .iter()
                    .zip(&out)
                    .all(|(a, b)| a.to_bits() == b.to_bits()),
            });
        }
    }
    Ok(reports)
}

/// Measures a CPU that has nothing else to do, with `threads` threads; about a second.
///
/// # Errors
/// When the system has no thread left.
pub fn rates(threads: usize) -> Result<Rates, CpuError> {
    /// As large as a small model's weights; no cache of today holds it.
    const LARGE: (usize, usize) = (16_384, 4096);
    const SMALL: (usize, usize) = (4096, 4096);
    let pool = ThreadPool::new(threads).map_err(CpuError::Thread)?;
    let mut random = Random(1);
    let mut seconds = |ty: GgmlType, (rows, cols): (usize, usize), tokens: usize| {
        // A few rows, again and again: random numbers take longer than the product.
        let some = random.weights(ty, 64 * cols);
        let bytes = some.repeat(rows / 64);
        let weight = LinearWeight::fast(ty, (rows, cols), &bytes, &pool)?;
        drop(bytes);
        let x: Vec<f32> = (0..tokens * cols).map(|_| random.signed()).collect();
        let mut out = vec![0.0; tokens * rows];
        let mut scratch = Scratch::new(tokens, cols);
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = Instant::now();
            linear(&pool, &[&weight], &x, tokens, &mut [&mut out], &mut scratch);
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok::<_, CpuError>((best, weight.bytes()))
    };
    let (read, bytes) = seconds(GgmlType::F32, LARGE, 1)?;
    let tokens = 64;
    let (matrix, _) = seconds(GgmlType::Q8_0, SMALL, tokens)?;
    Ok(Rates {
        read: bytes as f64 / read,
        matrix: (2 * SMALL.0 * SMALL.1 * tokens) as f64 / matrix,
    })
}

fn reference(ty: GgmlType, bytes: &[u8], x: &[f32]) -> Result<Vec<f64>, CpuError> {
    let mut weights = vec![0.0; ROWS * COLS];
    dequantize(ty, bytes, &mut weights)?;
    let dot = |x: &[f32], w: &[f32]| -> f64 {
        let pairs = x.iter().zip(w);
        pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
    };
    let of_token = |x| weights.chunks(COLS).map(move |w| dot(x, w));
    Ok(x.chunks(COLS).flat_map(of_token).collect())
}

fn distance(got: &[f32], want: &[f64]) -> f64 {
    let pairs = got.iter().zip(want);
    let (apart, size) = pairs.fold((0.0, 0.0), |(apart, size), (got, want)| {
        (apart + (f64::from(*got) - want).powi(2), size + want * want)
    });
    (apart / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1 .. 1.
    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Bytes of floats, or of blocks that begin with a float16 scale.
    fn weights(&mut self, ty: GgmlType, count: usize) -> Vec<u8> {
        let blocks = count / ty.block_elems();
        let mut bytes = Vec::with_capacity(blocks * ty.block_bytes());
        for _ in 0..blocks {
            let value = self.signed();
            match ty {
                GgmlType::F32 => bytes.extend(value.to_le_bytes()),
                GgmlType::BF16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
                _ => {
                    bytes.extend(f16::from_f32(value * 0.1).to_le_bytes());
                    bytes.extend((2..ty.block_bytes()).map(|_| self.next() as u8));
                }
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_instruction_set_computes_right() {
        let reports = run(7).unwrap();
        assert_eq!(reports.len(), 4 * Isa::available().len());
        for report in reports {
            assert!(report.error > 0.0, "nothing was compared: {report:?}");
            assert!(report.passed(), "{report:?}");
        }
    }
}
