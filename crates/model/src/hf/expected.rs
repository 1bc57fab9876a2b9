use super::config::HfConfig;

impl HfConfig {
    /// The tensors of a checkpoint with this configuration, by GGUF's names, the contiguous dimension
    /// first; projections that some checkpoints stack are apart.
    pub(super) fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let c = &self.model;
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), vec![c.hidden, c.vocab_size]),
            ("output_norm.weight".to_owned(), vec![c.hidden]),
        ];
        if !self.tied {
            tensors.push(("output.weight".to_owned(), vec![c.hidden, c.vocab_size]));
        }
        for layer in 0..c.layers {
            let mut add = |name: &str, dims: &[usize]| {
                tensors.push((format!("blk.{layer}.{name}"), dims.to_vec()));
            };
            add("attn_norm.weight", &[c.hidden]);
            for (name, rows) in [
                ("attn_q", c.q_width()),
                ("attn_k", c.kv_width()),
                ("attn_v", c.kv_width()),
            ] {
                add(&format!("{name}.weight"), &[c.hidden, rows]);
                if self.qkv_bias {
                    add(&format!("{name}.bias"), &[rows]);
                }
            }
            if c.qk_norm {
                add("attn_q_norm.weight", &[c.head_dim]);
                add("attn_k_norm.weight", &[c.head_dim]);
            }
            add("attn_output.weight", &[c.q_width(), c.hidden]);
            add("ffn_norm.weight", &[c.hidden]);
            if c.post_norms {
                add("post_attention_norm.weight", &[c.hidden]);
                add("post_ffw_norm.weight", &[c.hidden]);
            }
            add("ffn_gate.weight", &[c.hidden, c.ffn]);
            add("ffn_up.weight", &[c.hidden, c.ffn]);
            add("ffn_down.weight", &[c.ffn, c.hidden]);
        }
        tensors
    }
}
