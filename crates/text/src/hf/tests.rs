#![allow(clippy::unwrap_used)]

use serde_json::{Value as Json, json};

use crate::{TemplateSource, Tokenizer};

fn llama3() -> Json {
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "use_regex": false });
    let split = json!({ "type": "Split", "pattern": { "Regex": r" ?\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+" }, "behavior": "Isolated", "invert": false });
    json!({
        "added_tokens": [
            { "id": 6, "content": "<s>", "special": true },
            { "id": 7, "content": "</s>", "special": true },
            { "id": 9, "content": "<tool>", "special": false },
        ],
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split, byte_level] },
        "post_processor": {
            "type": "Sequence",
            "processors": [{ "type": "ByteLevel", "trim_offsets": true }, {
                "type": "TemplateProcessing",
                "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
                "special_tokens": { "<s>": { "ids": [6] } },
            }],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "byte_fallback": false,
            "vocab": { "a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "!": 5 },
            "merges": ["a b", "Ġ ab"],
        },
    })
}

fn llama2() -> Json {
    let mut vocab: serde_json::Map<String, Json> = (0..256)
        .map(|b| (format!("<0x{b:02X}>"), json!(b)))
        .collect();
    for (id, text) in (256..).zip(["▁", "a", "b", "▁a"]) {
        vocab.insert(text.into(), json!(id));
    }
    json!({
        "added_tokens": [],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ]},
        "model": { "type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"]] },
    })
}

fn load(json: &Json, config: Option<Json>) -> Result<Tokenizer, String> {
    let config = config.map(|c| c.to_string());
    let config = config.as_ref().map(String::as_bytes);
    Tokenizer::from_tokenizer_json(json.to_string().as_bytes(), config).map_err(|e| e.to_string())
}

#[test]
fn bos_and_eos_come_from_the_configuration() {
    let t = load(&llama3(), None).unwrap();
    assert_eq!(t.encode("ab ab", true, true).unwrap(), [6, 3, 4]);
    assert_eq!((t.bos(), t.eos_ids()), (Some(6), &[][..]));
    assert_eq!(t.vocab_size(), 10);
    assert_eq!(t.decode(&[3, 8, 9], true), "ab<tool>");

    let config = json!({ "bos_token": { "content": "<s>", "special": true }, "eos_token": "</s>" });
    let t = load(&llama3(), Some(config)).unwrap();
    assert_eq!((t.bos(), t.eos_ids()), (Some(6), &[7][..]));
    assert_eq!((t.bos_text(), t.eos_text()), ("<s>", "</s>"));

    let encode = |add_bos: Json, add_eos: bool| {
        let config = json!({
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": null,
            "add_bos_token": add_bos, "add_eos_token": add_eos,
        });
        let t = load(&llama3(), Some(config)).unwrap();
        t.encode("ab", true, true).unwrap()
    };
    assert_eq!(encode(json!(false), false), [3]);
    assert_eq!(encode(json!(true), true), [6, 3, 7]);
    assert_eq!(encode(Json::Null, false), [6, 3]);
}

/// M7: what is not known is refused, by name; nothing panics.
#[test]
fn refuses_other_shapes_by_name() {
    let cases: &[(&str, Json, &str)] = &[
        ("/model/type", json!("Unigram"), "model.type"),
        ("/model/type", json!("WordPiece"), "model.type"),
        ("/model/dropout", json!(0.1), "model.dropout"),
        ("/model/vocab/a", json!(4_000_000_000u32), "model.vocab"),
        ("/model/vocab/a", json!(1), "two tokens have the id 1"),
        ("/model/vocab/a", json!(-1), "-1"),
        ("/model/merges/0", json!("a c"), "\"a c\""),
        ("/model/merges/0", json!("ab"), "model.merges[0]"),
        ("/model/merges/0", json!(["a"]), "Merge"),
        (
            "/normalizer",
            json!({ "type": "Lowercase" }),
            "normalizer: unknown variant `Lowercase`",
        ),
        (
            "/normalizer",
            json!({ "type": "Prepend", "prepend": "▁" }),
            "normalizer",
        ),
        (
            "/pre_tokenizer",
            json!({ "type": "Whitespace" }),
            "pre_tokenizer: unknown",
        ),
        (
            "/pre_tokenizer",
            json!({ "type": "Sequence" }),
            "pre_tokenizer: a Sequence",
        ),
        ("/pre_tokenizer", Json::Null, "model.byte_fallback"),
        (
            "/pre_tokenizer/pretokenizers/0/pattern/Regex",
            json!("(?=a)"),
            "pre_tokenizer: Split",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/behavior",
            json!("Removed"),
            "behavior",
        ),
        (
            "/pre_tokenizer/pretokenizers/0",
            json!({ "type": "Bert" }),
            "pretokenizers[0]",
        ),
        (
            "/pre_tokenizer/pretokenizers/1/add_prefix_space",
            json!(true),
            "add_prefix_space",
        ),
        (
            "/post_processor",
            json!({ "type": "BertProcessing" }),
            "post_processor",
        ),
        (
            "/post_processor/processors/1/single",
            json!([]),
            "post_processor",
        ),
        (
            "/post_processor/processors/1/special_tokens",
            json!({}),
            "\"<s>\"",
        ),
        (
            "/post_processor/processors/1/special_tokens/<s>/ids",
            json!([99]),
            "99",
        ),
        ("/decoder", Json::Null, "decoder"),
        ("/added_tokens/0/id", json!(3), "added_tokens[0]"),
        ("/added_tokens/0/id", json!(7), "added_tokens[1]"),
        ("/added_tokens/0/content", json!("ab"), "added_tokens[0]"),
        ("/added_tokens/0/content", json!(""), "added_tokens[0]"),
        (
            "/added_tokens/0",
            json!({ "id": 6, "content": "<s>", "single_word": true }),
            "single_word",
        ),
        ("/model", json!([]), "tokenizer.json"),
        ("", json!([1]), "tokenizer.json"),
    ];
    for (pointer, value, expected) in cases {
        let mut json = llama3();
        *json.pointer_mut(pointer).unwrap() = value.clone();
        let error = load(&json, None)
            .err()
            .unwrap_or_else(|| panic!("{pointer} {value}"));
        assert!(error.starts_with("tok"), "{error}");
        assert!(error.contains(expected), "{pointer} {value}: {error}");
    }
}

#[test]
fn refuses_other_shapes_of_sentencepiece_by_name() {
    let metaspace = |scheme: &str, split: bool| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split });
    let cases: &[(&str, Json, &str)] = &[
        ("/model/vocab", json!({ "▁": 0, "a": 1, "▁a": 2 }), "<0x00>"),
        ("/normalizer", Json::Null, "spaces"),
        ("/normalizer/normalizers/0/prepend", json!("_"), "Prepend"),
        ("/normalizer/normalizers/1", json!({ "type": "NFC" }), "Nfc"),
        (
            "/normalizer/normalizers/1",
            json!({ "type": "Precompiled" }),
            "normalizers[1]",
        ),
        ("/pre_tokenizer", metaspace("first", false), "pre_tokenizer"),
        ("/decoder/decoders/3/start", json!(2), "decoder"),
        ("/decoder", json!({ "type": "WordPiece" }), "decoder"),
    ];
    for (pointer, value, expected) in cases {
        let mut json = llama2();
        *json.pointer_mut(pointer).unwrap() = value.clone();
        let error = load(&json, None)
            .err()
            .unwrap_or_else(|| panic!("{pointer} {value}"));
        assert!(error.contains(expected), "{pointer} {value}: {error}");
    }
    let mut json = llama2();
    json["normalizer"] = Json::Null;
    json["pre_tokenizer"] = metaspace("first", true);
    assert!(load(&json, None).err().unwrap().contains("split"));
    json["pre_tokenizer"] = metaspace("sometimes", false);
    assert!(load(&json, None).err().unwrap().contains("sometimes"));
    json["pre_tokenizer"] = metaspace("never", false);
    json["model"]["ignore_merges"] = json!(true);
    assert!(load(&json, None).err().unwrap().contains("ignore_merges"));
}

#[test]
fn cut_files_are_refused() {
    for json in [llama3(), llama2()] {
        let text = json.to_string();
        for end in (0..text.len()).filter(|&end| text.is_char_boundary(end)) {
            assert!(Tokenizer::from_tokenizer_json(&text.as_bytes()[..end], None).is_err());
        }
    }
    let config = |text: &str| {
        Tokenizer::from_tokenizer_json(llama3().to_string().as_bytes(), Some(text.as_bytes()))
    };
    for text in [
        "",
        "{",
        "[]",
        r#"{"bos_token": 1}"#,
        r#"{"eos_token": "nowhere"}"#,
    ] {
        let error = config(text).err().unwrap().to_string();
        assert!(error.starts_with("tokenizer_config.json"), "{error}");
    }
}

#[test]
fn templates_are_found() {
    let find = |config: Json, jinja: Option<&str>| {
        TemplateSource::find(Some(config.to_string().as_bytes()), jinja)
    };
    let one = || Some(TemplateSource::new("one"));
    assert_eq!(
        find(json!({ "chat_template": "one" }), None).unwrap(),
        one()
    );
    assert_eq!(
        find(json!({ "chat_template": "two" }), Some("one")).unwrap(),
        one()
    );
    assert_eq!(find(json!({ "chat_template": null }), None).unwrap(), None);
    assert_eq!(TemplateSource::find(None, None).unwrap(), None);
    let named = |names: &[&str]| {
        let list: Vec<Json> = names
            .iter()
            .map(|n| json!({ "name": n, "template": n }))
            .collect();
        find(json!({ "chat_template": list }), None)
    };
    let both = named(&["tool_use", "default", "rag"]).unwrap().unwrap();
    assert_eq!(
        (both.default.as_str(), both.tool_use.as_deref()),
        ("default", Some("tool_use"))
    );
    assert_eq!(
        named(&["default"]).unwrap(),
        Some(TemplateSource::new("default"))
    );
    assert!(named(&["rag"]).unwrap_err().to_string().contains("default"));
    assert!(find(json!({ "chat_template": 7 }), None).is_err());
}
