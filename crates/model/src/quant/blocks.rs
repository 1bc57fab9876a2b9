//! Blocks of 32 weights. Nibble `j` of the low halves is weight `j`, of the high halves `j + 16`.

use half::f16;

use super::Unpacked;

/// `scale: f16, nibbles: [u8; 16]`
pub(super) fn q4_0(block: &[u8], out: &mut Unpacked) {
    out.scale[0] = half_at(block, 0);
    out.min[0] = 0.0;
    nibbles(&block[2..], &mut out.q);
}

/// `scale: f16, min: f16, nibbles: [u8; 16]`
pub(super) fn q4_1(block: &[u8], out: &mut Unpacked) {
    out.scale[0] = half_at(block, 0);
    out.min[0] = half_at(block, 2);
    nibbles(&block[4..], &mut out.q);
}

/// `scale: f16, fifth bits: u32 (bit i is weight i), nibbles: [u8; 16]`
pub(super) fn q5_0(block: &[u8], out: &mut Unpacked) {
    out.scale[0] = half_at(block, 0);
    out.min[0] = 0.0;
    nibbles(&block[6..], &mut out.q);
    fifth_bits(&block[2..6], &mut out.q);
}

/// `scale: f16, min: f16, fifth bits: u32 (bit i is weight i), nibbles: [u8; 16]`
pub(super) fn q5_1(block: &[u8], out: &mut Unpacked) {
    out.scale[0] = half_at(block, 0);
    out.min[0] = half_at(block, 2);
    nibbles(&block[8..], &mut out.q);
    fifth_bits(&block[4..8], &mut out.q);
}

/// `scale: f16, weights: [i8; 32]`
pub(super) fn q8_0(block: &[u8], out: &mut Unpacked) {
    out.scale[0] = half_at(block, 0);
    out.min[0] = 0.0;
    for (q, &byte) in out.q[..32].iter_mut().zip(&block[2..]) {
        *q = byte ^ 0x80; // two's complement plus 128
    }
}

/// The little-endian float16 at byte `at`.
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn nibbles(bytes: &[u8], q: &mut [u8]) {
    let (low, high) = q[..32].split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = byte & 0x0f;
        *high = byte >> 4;
    }
}

fn fifth_bits(bits: &[u8], q: &mut [u8]) {
    for (q, &bits) in q[..32].chunks_exact_mut(8).zip(bits) {
        for (i, q) in q.iter_mut().enumerate() {
            *q |= ((bits >> i) & 1) << 4;
        }
    }
}
