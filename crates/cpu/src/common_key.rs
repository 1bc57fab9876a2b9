//! What all keys of a layer have in common, and the KV cache need not hold.
//!
//! Qwen 2 adds a bias to its keys that can be a hundred times as large as what tells keys apart, and
//! it is largest where the rotation is slowest: nearly the same vector is added to every key, and
//! rounding to a few bits spends them on it. Taken from every key, a vector changes all scores of a
//! query by the same number, which the softmax does not see.

use spate_model::ModelConfig;

use crate::rope::Ropes;

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
            rotation.common_part(&mut keys, model.head_dim, pairing, max_seq_len as usize);
            keys
        }
        _ => Vec::new(),
    });
    layers.collect()
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
