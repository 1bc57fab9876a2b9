//! The block formats of GGML, as GGUF files store them.
//!
//! A format is defined once, by [`unpack`]: it turns one block of bytes into small unsigned integers
//! with a scale and a minimum per group. [`dequantize`] and the repacking of the CPU backend both go
//! through it.
//!
//! The formats are those of the GGML project, version 2 of its quantisation layout (the one that
//! GGUF files declare as `general.quantization_version = 2`).

mod blocks;
mod iq4_blocks;
mod k_blocks;
#[cfg(test)]
mod tests;
mod types;

pub use types::{GgmlType, QuantError, Scheme};

use half::{bf16, f16};

/// Most weights in one block of any format.
pub const MAX_BLOCK: usize = 256;

/// Most groups (spans of weights that share a scale) in one block of any format.
pub const MAX_GROUPS: usize = 16;

/// One quantised block as integers: `value[i] = scale[g] * (q[i] - offset) + min[g]`, where
/// `g = i / group`; `group` and `offset` are those of the type's [`Scheme`].
#[derive(Debug, Clone)]
pub struct Unpacked {
    /// The integers, unsigned; the first `block_elems` count.
    pub q: [u8; MAX_BLOCK],
    /// One scale per group. It may be negative.
    pub scale: [f32; MAX_GROUPS],
    /// The value of a weight whose integer equals the offset; 0 in formats without minimum.
    pub min: [f32; MAX_GROUPS],
}

impl Default for Unpacked {
    fn default() -> Self {
        Self {
            q: [0; MAX_BLOCK],
            scale: [0.0; MAX_GROUPS],
            min: [0.0; MAX_GROUPS],
        }
    }
}

/// Splits one block of a quantised type into integers, scales and minima.
///
/// # Panics
/// If `block` is not `ty.block_bytes()` long or `ty` is a float type (its `scheme()` is `None`).
pub fn unpack(ty: GgmlType, block: &[u8], out: &mut Unpacked) {
    assert_eq!(block.len(), ty.block_bytes(), "one block of {ty}");
    match ty {
        GgmlType::Q4_0 => blocks::q4_0(block, out),
        GgmlType::Q4_1 => blocks::q4_1(block, out),
        GgmlType::Q5_0 => blocks::q5_0(block, out),
        GgmlType::Q5_1 => blocks::q5_1(block, out),
        GgmlType::Q8_0 => blocks::q8_0(block, out),
        GgmlType::Q2K => k_blocks::q2_k(block, out),
        GgmlType::Q3K => k_blocks::q3_k(block, out),
        GgmlType::Q4K => k_blocks::q4_k(block, out),
        GgmlType::Q5K => k_blocks::q5_k(block, out),
        GgmlType::Q6K => k_blocks::q6_k(block, out),
        GgmlType::Iq4Nl => iq4_blocks::iq4_nl(block, out),
        GgmlType::Iq4Xs => iq4_blocks::iq4_xs(block, out),
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => panic!("{ty} is not a quantised type"),
    }
}

/// Converts the weights in `bytes` to float32.
///
/// # Errors
/// [`QuantError::Length`] if `bytes` does not hold exactly `out.len()` weights of `ty` in whole blocks.
pub fn dequantize(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    let expected = ty.row_bytes(out.len())?;
    if bytes.len() != expected {
        return Err(QuantError::Length {
            ty,
            weights: out.len(),
            expected,
            got: bytes.len(),
        });
    }
    match ty {
        GgmlType::F32 => each(bytes, out, f32::from_le_bytes),
        GgmlType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        GgmlType::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        _ => dequantize_blocks(ty, bytes, out),
    }
    Ok(())
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    let (values, _) = bytes.as_chunks::<N>();
    for (out, value) in out.iter_mut().zip(values) {
        *out = convert(*value);
    }
}

fn dequantize_blocks(ty: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let Some(scheme) = ty.scheme() else {
        unreachable!("the caller handled the float types")
    };
    let offset = f32::from(scheme.offset);
    let mut unpacked = Unpacked::default();
    let blocks = bytes.chunks_exact(ty.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(ty.block_elems())) {
        unpack(ty, block, &mut unpacked);
        let groups = out
            .chunks_exact_mut(scheme.group)
            .zip(unpacked.q.chunks_exact(scheme.group));
        for (g, (out, q)) in groups.enumerate() {
            let (scale, min) = (unpacked.scale[g], unpacked.min[g]);
            for (out, &q) in out.iter_mut().zip(q) {
                *out = scale * (f32::from(q) - offset) + min;
            }
        }
    }
}
