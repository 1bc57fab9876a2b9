//! The tokenizer's part of a GGUF file.

use spate_model::{Metadata, ModelError};
use spate_text::VocabSpec;

/// Reads `tokenizer.ggml.*`. Which of it must be there is the tokenizer's business.
pub(crate) fn vocab_spec(metadata: &Metadata) -> Result<VocabSpec, ModelError> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let text = |name: &str| Ok(metadata.get_str(&key(name))?.map(str::to_owned));
    let texts = |name: &str| {
        Ok(metadata
            .get_array_str(&key(name))?
            .unwrap_or_default()
            .to_vec())
    };
    let model = text("model")?.unwrap_or_default();
    let architecture = metadata.get_str("general.architecture")?;
    Ok(VocabSpec {
        pre: text("pre")?,
        tokens: texts("tokens")?,
        token_types: metadata
            .get_array_i32(&key("token_type"))?
            .unwrap_or_default(),
        scores: metadata.get_array_f32(&key("scores"))?.unwrap_or_default(),
        merges: texts("merges")?,
        bos: metadata.get_u32(&key("bos_token_id"))?,
        eos: metadata.get_u32(&key("eos_token_id"))?,
        eot: metadata.get_u32(&key("eot_token_id"))?,
        add_bos: metadata.get_bool(&key("add_bos_token"))?,
        add_eos: metadata.get_bool(&key("add_eos_token"))?,
        add_space_prefix: metadata.get_bool(&key("add_space_prefix"))?,
        // No key tells: llama.cpp goes by the model's name.
        control_rstrip: model == "llama" && architecture == Some("phi3"),
        model,
    })
}
