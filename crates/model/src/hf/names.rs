//! How GGUF calls the tensors of a Hugging Face checkpoint.

/// What becomes of a tensor.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is known by this name.
    Named(String),
    /// It follows from the configuration, or another tensor says the same.
    Unused,
}

/// Translates a tensor's name; `None` for one that no supported architecture has.
///
/// `sandwich` models (Gemma) have norms behind attention and feed-forward block, too: what is
/// `post_attention_layernorm` there is not the norm before the feed-forward block. The head of a
/// `tied` model is its embedding table.
pub(super) fn gguf_name(name: &str, sandwich: bool, tied: bool) -> Option<Fate> {
    let named = |name: String| Some(Fate::Named(name));
    match name {
        "lm_head.weight" if tied => return Some(Fate::Unused),
        "lm_head.weight" => return named("output.weight".into()),
        _ => {}
    }
    let rest = name.strip_prefix("model.")?;
    match rest {
        "embed_tokens.weight" => return named("token_embd.weight".into()),
        "norm.weight" => return named("output_norm.weight".into()),
        _ => {}
    }
    let (layer, rest) = rest.strip_prefix("layers.")?.split_once('.')?;
    if layer.is_empty() || !layer.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    if rest == "self_attn.rotary_emb.inv_freq" {
        return Some(Fate::Unused);
    }
    let (module, kind) = rest.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" if sandwich => "post_attention_norm",
        "post_attention_layernorm" => "ffn_norm",
        "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        // GGUF calls the two stacked by the name of the second.
        "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    named(format!("blk.{layer}.{module}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Option<Fate> {
        gguf_name(name, false, false)
    }

    #[test]
    fn names_translate() {
        let named = |text: &str| Some(Fate::Named(text.into()));
        assert_eq!(
            name("model.embed_tokens.weight"),
            named("token_embd.weight")
        );
        assert_eq!(name("lm_head.weight"), named("output.weight"));
        assert_eq!(gguf_name("lm_head.weight", false, true), Some(Fate::Unused));
        assert_eq!(
            name("model.layers.12.self_attn.k_proj.bias"),
            named("blk.12.attn_k.bias")
        );
        let norm = "model.layers.0.post_attention_layernorm.weight";
        assert_eq!(name(norm), named("blk.0.ffn_norm.weight"));
        assert_eq!(
            gguf_name(norm, true, false),
            named("blk.0.post_attention_norm.weight")
        );
        assert_eq!(
            name("model.layers.3.self_attn.rotary_emb.inv_freq"),
            Some(Fate::Unused)
        );
        for unknown in [
            "score.weight",
            "model.layers.x.mlp.up_proj.weight",
            "model.layers.0.mlp.up_proj.weight_scale",
            "model.layers.0.mlp.experts.0.up_proj.weight",
            "model.layers.0",
        ] {
            assert_eq!(name(unknown), None, "{unknown}");
        }
    }
}
