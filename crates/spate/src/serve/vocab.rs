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
    // No key tells this of Phi-3; llama.cpp goes by the model's name.
    let is_phi3 = model == "llama" && metadata.get_str("general.architecture")? == Some("phi3");
    Ok(VocabSpec {
        model,
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
        control_rstrip: is_phi3,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::Value as Json;
    use spate_model::Gguf;
    use spate_text::Tokenizer;

    use super::*;

    /// The tokens of a real model's file are those of llama.cpp, and of the model's own tokenizer.
    fn golden_tokens(variable: &str, golden: &str) {
        let Some(path) = std::env::var_os(variable) else {
            let required = std::env::var_os("SPATE_REQUIRE_MODEL").is_some_and(|v| v == "all");
            assert!(!required, "the model of {golden} is required");
            eprintln!("SKIPPED: set {variable} to the GGUF file of {golden}");
            return;
        };
        let gguf = Gguf::open(Path::new(&path)).unwrap();
        let tokenizer = Tokenizer::from_vocab(vocab_spec(gguf.metadata()).unwrap()).unwrap();
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden");
        let golden = std::fs::read(Path::new(root).join(golden)).unwrap();
        let golden: Json = serde_json::from_slice(&golden).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let expected = case["prompt_tokens"].as_array().unwrap();
            let tokens = tokenizer.encode(text, true, true).unwrap();
            assert_eq!(
                Json::from(tokens.as_slice()),
                Json::from(expected.as_slice()),
                "{text}"
            );
            let skips = !text.contains("<|");
            assert_eq!(tokenizer.decode(&tokens, skips), text);

            let greedy = case["greedy"].as_array().unwrap();
            let ids = greedy.iter().map(|g| g["token"].as_u64().unwrap() as u32);
            let ids: Vec<u32> = ids.filter(|&id| !tokenizer.is_special(id)).collect();
            assert_eq!(
                tokenizer.decode(&ids, true),
                case["greedy_text"].as_str().unwrap()
            );
        }
    }

    #[test]
    fn smollm2() {
        golden_tokens("SPATE_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.json");
    }

    #[test]
    fn qwen2() {
        golden_tokens("SPATE_TEST_QWEN", "qwen-0.5b.json");
    }

    #[test]
    fn gemma3() {
        golden_tokens("SPATE_TEST_GEMMA", "gemma3-270m-q4_k_m.json");
    }
}
