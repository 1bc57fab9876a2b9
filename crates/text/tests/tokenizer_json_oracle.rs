//! Our reading of `tokenizer.json` against the `tokenizers` crate, on random vocabularies in the
//! shapes of real models' files.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value as Json, json};
use spate_text::Tokenizer;
use tokenizers::Tokenizer as Oracle;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The parts of one family's file that are not vocabulary.
fn shape(family: &str) -> Json {
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let split = |regex: &str, behavior: &str, invert: bool| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": behavior, "invert": invert });
    let sequence = |parts: Json| json!({ "type": "Sequence", "pretokenizers": parts });
    let prepend = json!({ "type": "Prepend", "prepend": "▁" });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let metaspace = |scheme: &str| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false });
    let decoder = |strip: bool| {
        let mut parts = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if strip {
            parts.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        json!({ "type": "Sequence", "decoders": parts })
    };
    let (normalizer, pre_tokenizer, decoder) = match family {
        "gpt2" => (Json::Null, byte_level(true), byte_level(true)),
        "smollm" => (
            Json::Null,
            sequence(json!([{ "type": "Digits", "individual_digits": true }, byte_level(true)])),
            byte_level(true),
        ),
        "llama3" => (
            Json::Null,
            sequence(json!([split(LLAMA3, "Isolated", false), byte_level(false)])),
            byte_level(true),
        ),
        "phi4" => (
            json!({ "type": "Sequence", "normalizers": [] }),
            sequence(json!([split(LLAMA3, "Removed", true), byte_level(false)])),
            byte_level(true),
        ),
        "qwen2" => (
            json!({ "type": "NFC" }),
            sequence(json!([split(QWEN2, "Isolated", false), byte_level(false)])),
            byte_level(true),
        ),
        "llama2" => (
            json!({ "type": "Sequence", "normalizers": [prepend, replace] }),
            Json::Null,
            decoder(true),
        ),
        "mistral" => (Json::Null, metaspace("first"), decoder(true)),
        "metaspace" => (Json::Null, metaspace("always"), decoder(true)),
        "no-prefix" => (Json::Null, metaspace("never"), decoder(false)),
        "gemma3" => (
            replace,
            json!({ "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious", "invert": false }),
            decoder(false),
        ),
        other => panic!("no family {other}"),
    };
    json!({ "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder })
}

const BYTE_LEVEL: &[&str] = &["gpt2", "smollm", "llama3", "phi4", "qwen2"];
const SENTENCEPIECE: &[&str] = &["llama2", "mistral", "metaspace", "no-prefix", "gemma3"];

fn added(id: usize, content: &str, flags: &[&str]) -> Json {
    let has = |flag| flags.contains(&flag);
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": has("lstrip"),
        "rstrip": has("rstrip"), "normalized": has("normalized"), "special": has("special"),
    })
}

/// A file of one family, whose merges join the tokens that `picks` names.
fn file(family: &str, picks: &[(Index, Index)], merges_as_pairs: bool) -> Json {
    let byte_level = BYTE_LEVEL.contains(&family);
    let (mut tokens, mut pool): (Vec<String>, Vec<&str>) = if byte_level {
        let alphabet: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
        let tokens = alphabet.into_iter().map(String::from).collect();
        (tokens, vec!["a", "b", "Ġ", "1", "Ã", "©", "Ċ"])
    } else {
        let bytes = (0..=255).map(|b: u8| format!("<0x{b:02X}>"));
        let pool = vec!["a", "b", "▁", "1", "é", "s"];
        (
            bytes.chain(pool.iter().map(|t| t.to_string())).collect(),
            pool,
        )
    };
    let mut pool: Vec<String> = pool.drain(..).map(str::to_owned).collect();
    let mut merges = Vec::new();
    for (left, right) in picks {
        let (left, right) = (left.get(&pool).clone(), right.get(&pool).clone());
        let joined = format!("{left}{right}");
        if joined.chars().count() <= 12 && !tokens.contains(&joined) {
            merges.push(match merges_as_pairs {
                true => json!([left, right]),
                false => json!(format!("{left} {right}")),
            });
            tokens.push(joined.clone());
            pool.push(joined);
        }
    }
    let n = tokens.len();
    let aab = tokens.iter().position(|t| t == "aab");
    let mut file = shape(family);
    let more = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [
            added(n, "<s>", &["special"]),
            added(n + 1, "<|end|>", &["special", "rstrip"]),
            added(n + 2, "<mask>", &["special", "lstrip"]),
            added(n + 3, "<tool>", &[]),
            added(aab.unwrap_or(n + 4), "aab", &["normalized"]),
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [n], "tokens": ["<s>"] } },
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": !byte_level,
            "ignore_merges": family == "llama3",
            "vocab": tokens.iter().zip(0..).collect::<std::collections::HashMap<_, u32>>(),
            "merges": merges,
        },
    });
    let parts = file.as_object_mut().unwrap();
    parts.extend(more.as_object().unwrap().clone());
    if !byte_level {
        // `tokenizers` looks for "▁aab" then, see `whole_tokens` in hf/mod.rs.
        parts["added_tokens"][4]["normalized"] = json!(false);
    }
    file
}

fn compare(file: &Json, text: &str) -> Result<(), TestCaseError> {
    let bytes = serde_json::to_vec(file).unwrap();
    let oracle = Oracle::from_bytes(&bytes).unwrap();
    let ours = Tokenizer::from_tokenizer_json(&bytes, None).unwrap();
    for add_special_tokens in [false, true] {
        let expected = oracle.encode(text, add_special_tokens).unwrap();
        let tokens = ours.encode(text, add_special_tokens, true).unwrap();
        prop_assert_eq!(&tokens, expected.get_ids(), "{:?}", expected.get_tokens());
        for skip in [false, true] {
            let decoded = oracle.decode(&tokens, skip).unwrap();
            prop_assert_eq!(ours.decode(&tokens, skip), decoded);
        }
    }
    Ok(())
}

fn picks() -> impl Strategy<Value = Vec<(Index, Index)>> {
    prop::collection::vec(any::<(Index, Index)>(), 0..60)
}

const TEXT: &str = "([ab ]{1,8}|[ab1 '\n\r\té中!s]{1,6}|<s>|<\\|end\\|>|<mask>|<tool>|e\u{301}|'LL|👩|\u{200d}|²|\u{3000}){0,12}";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn byte_level(
        family in prop::sample::select(BYTE_LEVEL),
        picks in picks(),
        pairs: bool,
        text in TEXT,
    ) {
        compare(&file(family, &picks, pairs), &text)?;
    }

    #[test]
    fn sentencepiece(
        family in prop::sample::select(SENTENCEPIECE),
        picks in picks(),
        pairs: bool,
        text in TEXT,
    ) {
        compare(&file(family, &picks, pairs), &text)?;
    }

    /// A GGUF vocabulary with scores merges as the list of merges made from them does.
    #[test]
    fn scores(picks in picks(), text in "[ab1é\n👩 ]{0,40}") {
        let file = file("gemma3", &picks, true);
        let vocab = file["model"]["vocab"].as_object().unwrap();
        let mut tokens = vec![String::new(); vocab.len()];
        for (token, id) in vocab {
            tokens[id.as_u64().unwrap() as usize].clone_from(token);
        }
        // As converters make merges of scores: each way to cut a token, sorted by its score.
        let mut merges = Vec::new();
        for token in &tokens[256..] {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if vocab.contains_key(left) && vocab.contains_key(right) {
                    merges.push(json!([left, right]));
                }
            }
        }
        let mut oracle = file.clone();
        oracle["model"]["merges"] = Json::Array(merges);
        oracle["added_tokens"] = json!([]);
        oracle["post_processor"] = Json::Null;
        let oracle = Oracle::from_bytes(serde_json::to_vec(&oracle).unwrap()).unwrap();
        let ours = Tokenizer::from_vocab(spate_text::VocabSpec {
            model: "llama".into(),
            token_types: (0..tokens.len()).map(|id| if id < 256 { 6 } else { 1 }).collect(),
            scores: (0..tokens.len()).map(|id| -(id as f32)).collect(),
            add_space_prefix: Some(false),
            tokens,
            ..spate_text::VocabSpec::default()
        });
        let expected = oracle.encode(text.as_str(), false).unwrap();
        let tokens = ours.unwrap().encode(&text, false, true).unwrap();
        prop_assert_eq!(&tokens, expected.get_ids(), "{:?}", expected.get_tokens());
    }
}
