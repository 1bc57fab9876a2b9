//! The 8-bit formats of the KV cache in plain float64 arithmetic.

use half::bf16;

use crate::kernels::{KvDtype, KvShape};

/// One position's key or value in a head, as the cache has it.
pub(super) struct Row {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<bf16>,
}

impl Row {
    /// Rounds numbers to a shape's format.
    pub(super) fn new(shape: &KvShape, x: &[f64]) -> Self {
        let mut row = Self {
            codes: vec![0; x.len()],
            scales: Vec::new(),
        };
        let group = x.len() / shape.scales();
        for (at, group) in x.chunks(group).enumerate().map(|(i, x)| (i * group, x)) {
            let largest = group.iter().fold(0f64, |largest, x| largest.max(x.abs()));
            let scale = bf16::from_f64(largest / limit(shape.dtype()) * 1.01);
            row.scales.push(scale);
            for (i, x) in group.iter().enumerate() {
                row.codes[place(at + i)] = encode(shape.dtype(), x / scale.to_f64());
            }
        }
        row
    }

    /// The row at an offset of a tile of the cache.
    pub(super) fn read(shape: &KvShape, tile: &[u8], offset: usize) -> Self {
        let (dim, scales) = (shape.head_dim as usize, shape.scales());
        let at = shape.block_size as usize * dim + offset * 2 * scales;
        let (pairs, _) = tile[at..at + 2 * scales].as_chunks::<2>();
        Self {
            codes: tile[offset * dim..][..dim].to_vec(),
            scales: pairs
                .iter()
                .map(|pair| bf16::from_le_bytes(*pair))
                .collect(),
        }
    }

    pub(super) fn write(&self, shape: &KvShape, tile: &mut [u8], offset: usize) {
        let dim = self.codes.len();
        tile[offset * dim..][..dim].copy_from_slice(&self.codes);
        let at = shape.block_size as usize * dim + offset * 2 * self.scales.len();
        for (i, scale) in self.scales.iter().enumerate() {
            tile[at + 2 * i..][..2].copy_from_slice(&scale.to_le_bytes());
        }
    }

    /// The scale of an element.
    pub(super) fn scale(&self, i: usize) -> f64 {
        self.scales[i * self.scales.len() / self.codes.len()].to_f64()
    }

    /// The numbers, before they are rounded to bfloat16.
    pub(super) fn values(&self, dtype: KvDtype) -> Vec<f64> {
        let value = |i| decode(dtype, self.codes[place(i)]) * self.scale(i);
        (0..self.codes.len()).map(value).collect()
    }
}

/// The largest code's value.
pub(super) fn limit(dtype: KvDtype) -> f64 {
    match dtype {
        KvDtype::Fp8 => 448.0,
        _ => 127.0,
    }
}

/// Where element `i` of a row is.
fn place(i: usize) -> usize {
    i / 4 * 4 + [1, 3, 0, 2][i % 4]
}

fn decode(dtype: KvDtype, code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    sign * match (dtype, exponent) {
        (KvDtype::Fp8, 0) => mantissa / 512.0,
        (KvDtype::Fp8, _) => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        _ => f64::from(code & 0x7f),
    }
}

/// The nearest code.
fn encode(dtype: KvDtype, x: f64) -> u8 {
    let (sign, x) = (u8::from(x < 0.0) << 7, x.abs().min(limit(dtype)));
    if dtype != KvDtype::Fp8 {
        return sign | x.round_ties_even() as u8;
    }
    let step = 2f64.powi((x.max(1e-9).log2().floor() as i32).max(-6) - 3);
    let rounded = (x / step).round_ties_even() * step;
    if rounded < 1.0 / 64.0 {
        return sign | (rounded * 512.0) as u8;
    }
    let exponent = rounded.log2().floor();
    let mantissa = (rounded / exponent.exp2() - 1.0) * 8.0;
    sign | ((exponent as i32 + 7) << 3) as u8 | mantissa as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_nearest() {
        for dtype in [KvDtype::Int8, KvDtype::Fp8] {
            // In e4m3 the last code of each sign means that it is not a number.
            let last = if dtype == KvDtype::Fp8 { 0x7e } else { 0x7f };
            for code in (0..=last).flat_map(|code| [code, code | 0x80]) {
                let x = decode(dtype, code);
                assert_eq!(decode(dtype, encode(dtype, x)), x, "{dtype:?} {code}");
            }
        }
        assert_eq!(decode(KvDtype::Fp8, 0x7e), 448.0);
    }
}
