//! The "IQ4" formats: nibbles that choose from a table of unevenly spaced values, denser around
//! zero, where most weights are.

use super::{Unpacked, blocks::half_at};

/// The table, plus 128: the integers of a scheme are unsigned.
const VALUES: [u8; 16] = {
    const SIGNED: [i8; 16] = [
        -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
    ];
    let mut values = [0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = SIGNED[i].cast_unsigned() ^ 0x80;
        i += 1;
    }
    values
};

/// `scale: f16, nibbles: [u8; 16]`
pub(super) fn iq4_nl(block: &[u8], out: &mut Unpacked) {
    out.scale[0] = half_at(block, 0);
    out.min[0] = 0.0;
    chosen(&block[2..], &mut out.q[..32]);
}

/// `d: f16, high two bits of the scales: u16, low nibbles of the scales: [u8; 4], nibbles: [u8; 128]`;
/// a group's scale is `d` times its 6 bits minus 32.
pub(super) fn iq4_xs(block: &[u8], out: &mut Unpacked) {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let groups = block[8..].chunks_exact(16).zip(out.q.chunks_exact_mut(32));
    for (g, (nibbles, q)) in groups.enumerate() {
        let low = (block[4 + g / 2] >> (g % 2 * 4)) & 0x0f;
        let high = (high >> (2 * g)) as u8 & 0x03;
        out.scale[g] = d * (f32::from(low | (high << 4)) - 32.0);
        out.min[g] = 0.0;
        chosen(nibbles, q);
    }
}

/// Low nibbles choose the first half of the values, high nibbles the second.
fn chosen(nibbles: &[u8], q: &mut [u8]) {
    let (low, high) = q.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(nibbles) {
        *low = VALUES[usize::from(byte & 0x0f)];
        *high = VALUES[usize::from(byte >> 4)];
    }
}
