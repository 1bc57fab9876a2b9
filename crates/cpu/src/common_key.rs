//! What all keys of a layer have in common, and the KV cache need not hold.
//!
//! Qwen 2 adds a bias to its keys that can be a hundred times as large as what tells keys apart, and
//! it is largest where the rotation is slowest: nearly the same vector is added to every key, and
//! rounding to a few bits spends them on it. Taken from every key, a vector changes all scores of a
//! query by the same number, which the softmax does not see.

use spate_model::{ModelConfig, RopePairing, Rotation};

use crate::linear::Isa;
use crate::rope::{NormRotate, Ropes};

/// For each layer what is taken from every key, `[kv_heads * head_dim]`; nothing if its keys have no
/// bias. `biases` are those of the layers' stacked query, key and value projections.
pub(crate) fn common_keys<'a>(
    model: &ModelConfig,
    ropes: &Ropes,
    max_seq_len: u32,
    biases: impl Iterator<Item = Option<&'a [f32]>>,
) -> Vec<Vec<f32>> {
    let layers = biases.enumerate().map(|(layer, bias)| match bias {
        // A norm after the bias leaves no constant part.
        Some(bias) if !model.qk_norm => {
            let mut keys = bias[model.q_width()..][..model.kv_width()].to_vec();
            let rotation = &ropes.rotations[ropes.of_layer[layer]];
            let pairing = model.rope(layer).pairing;
            hold(&mut keys, model.head_dim, rotation, pairing, max_seq_len);
            keys
        }
        _ => Vec::new(),
    });
    layers.collect()
}

/// Rotates the bias to position 0 and clears the pairs that are elsewhere by the end of the longest
/// sequence: within a radian, what is left of a rotated vector without the vector is shorter than it.
fn hold(
    keys: &mut [f32],
    head_dim: usize,
    rotation: &Rotation,
    pairing: RopePairing,
    max_seq_len: u32,
) {
    let slow = |rate: &f64| rate * f64::from(max_seq_len) < 1.0;
    let scale = |rate| match slow(rate) {
        true => rotation.magnitude as f32,
        false => 0.0,
    };
    let scales: Vec<_> = rotation.rates.iter().map(|r| (scale(r), 0.0)).collect();
    Isa::best().run(NormRotate {
        width: keys.len(),
        x: keys,
        head_dim,
        rotations: &scales,
        pairing,
        norm: None,
    });
}

/// Takes the common part from each of the keys, `[tokens, kv_heads * head_dim]`.
pub(crate) fn subtract(keys: &mut [f32], common: &[f32]) {
    if common.is_empty() {
        return;
    }
    for key in keys.chunks_exact_mut(common.len()) {
        key.iter_mut().zip(common).for_each(|(k, c)| *k -= c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_slow_pairs_and_unrotated_elements_are_common() {
        let rotation = Rotation {
            rates: vec![1.0, 1e-3, 1e-5],
            magnitude: 2.0,
        };
        let held = |pairing, max_seq_len| {
            let mut keys: Vec<f32> = (1..=16).map(|x| x as f32).collect();
            hold(&mut keys, 8, &rotation, pairing, max_seq_len);
            keys
        };
        let halves = [
            [0.0, 0.0, 6.0, 0.0, 0.0, 12.0, 7.0, 8.0],
            [0.0, 0.0, 22.0, 0.0, 0.0, 28.0, 15.0, 16.0],
        ];
        assert_eq!(held(RopePairing::Halves, 1000), halves.concat());
        let interleaved = held(RopePairing::Interleaved, 999);
        assert_eq!(interleaved[..8], [0.0, 0.0, 6.0, 8.0, 10.0, 12.0, 7.0, 8.0]);
    }
}
