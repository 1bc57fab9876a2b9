//! The "K" formats: blocks of 256 weights in 8 groups of 32 or 16 groups of 16, whose scales (and
//! minima) are small integers times one or two float16 of the block.

use super::{Unpacked, blocks::half_at};

/// `scales: [u8; 16] (low nibble scale, high nibble minimum), two bits: [u8; 64], d: f16, dmin: f16`
pub(super) fn q2_k(block: &[u8], out: &mut Unpacked) {
    let (d, d_min) = (half_at(block, 80), half_at(block, 82));
    for (g, &scale) in block[..16].iter().enumerate() {
        out.scale[g] = d * f32::from(scale & 0x0f);
        out.min[g] = -(d_min * f32::from(scale >> 4));
    }
    two_bits(&block[16..80], &mut out.q);
}

/// `third bits: [u8; 32], two bits: [u8; 64], scales: [u8; 12] (16 of 6 bits, plus 32), d: f16`
pub(super) fn q3_k(block: &[u8], out: &mut Unpacked) {
    let d = half_at(block, 108);
    let scales = &block[96..108];
    for g in 0..16 {
        let low = (scales[g % 8] >> (g / 8 * 4)) & 0x0f;
        let high = (scales[8 + g % 4] >> (g / 4 * 2)) & 0x03;
        out.scale[g] = d * (f32::from(low | (high << 4)) - 32.0);
        out.min[g] = 0.0;
    }
    two_bits(&block[32..96], &mut out.q);
    for (plane, q) in out.q.chunks_exact_mut(32).enumerate() {
        for (q, &bits) in q.iter_mut().zip(&block[..32]) {
            *q |= ((bits >> plane) & 1) << 2;
        }
    }
}

/// `d: f16, dmin: f16, scales: [u8; 12], nibbles: [u8; 128]`
pub(super) fn q4_k(block: &[u8], out: &mut Unpacked) {
    scales_and_mins(block, out);
    nibbles(&block[16..144], &mut out.q);
}

/// `d: f16, dmin: f16, scales: [u8; 12], fifth bits: [u8; 32], nibbles: [u8; 128]`
pub(super) fn q5_k(block: &[u8], out: &mut Unpacked) {
    scales_and_mins(block, out);
    nibbles(&block[48..176], &mut out.q);
    for (plane, q) in out.q.chunks_exact_mut(32).enumerate() {
        for (q, &bits) in q.iter_mut().zip(&block[16..48]) {
            *q |= ((bits >> plane) & 1) << 4;
        }
    }
}

/// `low nibbles: [u8; 128], high two bits: [u8; 64], scales: [i8; 16], d: f16`
pub(super) fn q6_k(block: &[u8], out: &mut Unpacked) {
    let d = half_at(block, 208);
    for (g, &scale) in block[192..208].iter().enumerate() {
        out.scale[g] = d * f32::from(scale.cast_signed());
        out.min[g] = 0.0;
    }
    for (half, q) in out.q.chunks_exact_mut(128).enumerate() {
        let low = &block[half * 64..][..64];
        let high = &block[128 + half * 32..][..32];
        for l in 0..32 {
            q[l] = (low[l] & 0x0f) | ((high[l] & 0x03) << 4);
            q[l + 32] = (low[l + 32] & 0x0f) | (((high[l] >> 2) & 0x03) << 4);
            q[l + 64] = (low[l] >> 4) | (((high[l] >> 4) & 0x03) << 4);
            q[l + 96] = (low[l + 32] >> 4) | ((high[l] >> 6) << 4);
        }
    }
}

/// 32 bytes hold 128 weights: bits 0–1 the first 32, bits 2–3 the next, and so on.
fn two_bits(bytes: &[u8], q: &mut [u8]) {
    for (q, bytes) in q.chunks_exact_mut(128).zip(bytes.chunks_exact(32)) {
        for (plane, q) in q.chunks_exact_mut(32).enumerate() {
            for (q, &byte) in q.iter_mut().zip(bytes) {
                *q = (byte >> (2 * plane)) & 0x03;
            }
        }
    }
}

/// 32 bytes hold 64 weights: low nibbles the first 32, high nibbles the others.
fn nibbles(bytes: &[u8], q: &mut [u8]) {
    for (q, bytes) in q.chunks_exact_mut(64).zip(bytes.chunks_exact(32)) {
        let (low, high) = q.split_at_mut(32);
        for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
            *low = byte & 0x0f;
            *high = byte >> 4;
        }
    }
}

/// Eight 6-bit scales and eight 6-bit minima in twelve bytes: bytes 0–3 hold scales 0–3 and bytes
/// 4–7 minima 0–3 in their low six bits; the low four bits of the others are in bytes 8–11 (scale
/// low nibble, minimum high nibble), their high two bits on top of bytes 0–3 and 4–7.
fn scales_and_mins(block: &[u8], out: &mut Unpacked) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for g in 0..8 {
        let (scale, min) = if g < 4 {
            (packed[g] & 0x3f, packed[g + 4] & 0x3f)
        } else {
            (
                (packed[g + 4] & 0x0f) | ((packed[g - 4] >> 6) << 4),
                (packed[g + 4] >> 4) | ((packed[g] >> 6) << 4),
            )
        };
        out.scale[g] = d * f32::from(scale);
        out.min[g] = -(d_min * f32::from(min));
    }
}
