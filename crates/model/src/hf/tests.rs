#![allow(clippy::unwrap_used)]

use std::os::unix::fs::symlink;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::testing::hf::{SafetensorsBuilder, TempDir, convert_to_hf, safetensors};
use crate::testing::{TempFile, TinyLlama, tiny_llama};
use crate::{Gguf, check_tensors};

fn open(dir: &TempDir) -> Result<HfModel, ModelError> {
    HfModel::open(&HfDirectory::open(dir.path())?)
}

/// The message, after checking that it names a place in the directory.
fn refusal(dir: &TempDir) -> String {
    let message = open(dir).unwrap_err().to_string();
    assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
    message
}

fn tiny(files: usize) -> TempDir {
    let spec = TinyLlama {
        weights: GgmlType::F16,
        value_weights: GgmlType::F16,
        layers: 2,
        ..TinyLlama::default()
    };
    let file = TempFile::new(&tiny_llama(&spec));
    let dir = TempDir::new();
    convert_to_hf(
        &Gguf::open(file.path()).unwrap(),
        &dir,
        GgmlType::F16,
        files,
    );
    dir
}

/// Changes the JSON file `name`.
fn edit(dir: &TempDir, name: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.path().join(name);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn shows_tensors_by_the_names_of_gguf() {
    for files in [1, 2] {
        let dir = tiny(files);
        let model = open(&dir).unwrap();
        let config = model.config().unwrap();
        assert_eq!((config.layers, config.hidden, config.ffn), (2, 64, 96));
        assert_eq!((config.heads, config.kv_heads, config.head_dim), (4, 2, 16));
        assert_eq!(config.rope(0).pairing, crate::RopePairing::Halves);
        let down = model.tensor("blk.1.ffn_down.weight").unwrap();
        assert_eq!((&down.dims[..], down.bytes), (&[96, 64][..], 96 * 64 * 2));
        let mut bytes = Vec::new();
        model.read(down, &mut bytes).unwrap();
        assert_eq!(bytes.len(), down.bytes);
        assert!(bytes.iter().any(|&b| b != 0));
    }
}

// Row M1: whatever is cut, the message names the file, and the byte for the header and the data.
#[test]
fn every_cut_is_an_error() {
    let file = SafetensorsBuilder::default()
        .tensor("a", "F32", &[2, 3], &[1; 24])
        .tensor("b", "BF16", &[4], &[2; 8])
        .build();
    let dir = TempDir::new();
    for len in 0..file.len() {
        let path = dir.write("cut.safetensors", &file[..len]);
        let message = Safetensors::open(&path, 0).unwrap_err().to_string();
        assert!(message.contains("cut.safetensors: at byte "), "{message}");
    }
    let path = dir.write("whole.safetensors", &file);
    assert_eq!(Safetensors::open(&path, 0).unwrap().tensors.len(), 2);
}

#[test]
fn a_file_that_shrinks_later_is_an_error() {
    let dir = tiny(1);
    let model = open(&dir).unwrap();
    let path = dir.path().join(WEIGHTS);
    let half = std::fs::metadata(&path).unwrap().len() / 2;
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(half).unwrap();
    let errors = model.tensors().iter().filter_map(|t| {
        let error = model.read(t, &mut Vec::new()).err()?;
        Some(error.to_string())
    });
    let errors: Vec<String> = errors.collect();
    assert!(!errors.is_empty());
    assert!(errors.iter().all(|e| e.contains("is cut")), "{errors:?}");
}

// Row M3.
#[test]
fn malformed_safetensors() {
    let dir = TempDir::new();
    let check = |bytes: &[u8], why: &str| {
        let path = dir.write("x.safetensors", bytes);
        let message = Safetensors::open(&path, 0).unwrap_err().to_string();
        assert!(message.contains("x.safetensors: at byte "), "{message}");
        assert!(message.contains(why), "{why}: {message}");
    };
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let a = entry("F32", "[1]", "[0,4]");
    let one = |entry: String| safetensors(&format!(r#"{{"a":{entry}}}"#), &[0; 4]);

    // The header's length.
    for length in [u64::MAX, 1 << 62, 200_000_000, 1000] {
        let mut bytes = one(a.clone());
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        check(&bytes, "a header of");
    }
    check(&safetensors("", &[]), "EOF");
    check(&safetensors("[]", &[]), "an object");
    check(&safetensors("{\"a\":\u{1}}", &[]), "the header");
    check(&safetensors(&"[".repeat(10_000), &[]), "the header");
    check(
        &safetensors(&format!("{{\"a\":{}", "[".repeat(500)), &[]),
        "recursion",
    );

    // Shapes.
    for shape in [
        "[18446744073709551615,4]",
        "[4294967296,4294967296]",
        "[2]",
        "[0]",
    ] {
        check(&one(entry("F32", shape, "[0,4]")), "don't take the bytes");
    }
    check(&one(entry("F32", "[-1]", "[0,4]")), "malformed");
    check(&one(entry("F32", "[1]", "[4,0]")), "don't take the bytes");
    check(&one(r#"{"dtype":"F32"}"#.into()), "malformed");
    check(&one(entry("I64", "[1]", "[0,8]")), "the dtype I64");
    check(&one(entry("F8_E4M3", "[4]", "[0,4]")), "the dtype F8_E4M3");

    // Gaps, overlaps, and data beyond the file or not described.
    check(&one(entry("F32", "[1]", "[4,8]")), "begins at 4");
    let two = |b: &str, len: usize| {
        let b = entry("F32", "[1]", b);
        safetensors(&format!(r#"{{"a":{a},"b":{b}}}"#), &vec![0; len])
    };
    check(&two("[0,4]", 8), "begins at 0");
    check(&two("[8,12]", 12), "begins at 8");
    check(&two("[4,8]", 7), "which has");
    check(&two("[4,8]", 9), "1 bytes follow");
    check(
        &two("[18446744073709551612,18446744073709551616]", 8),
        "malformed",
    );
    check(
        &two("[18446744073709551611,18446744073709551615]", 8),
        "begins at",
    );

    // Names.
    let twice = format!(r#"{{"a":{a},"a":{a}}}"#);
    check(&safetensors(&twice, &[0; 4]), "`a` appears twice");
}

#[test]
fn metadata_and_empty_tensors_are_no_weights() {
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},
        "a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
    let dir = TempDir::new();
    let path = dir.write("x.safetensors", safetensors(header, &[0; 4]));
    let file = Safetensors::open(&path, 0).unwrap();
    let names: Vec<&str> = file.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
}

// Row M4.
#[test]
fn shards_must_be_there_and_inside() {
    let dir = tiny(2);
    let last = "model-00002-of-00002.safetensors";
    let set_file = |file: &str| {
        edit(&dir, INDEX, |index| {
            index["weight_map"]["model.layers.1.mlp.up_proj.weight"] = json!(file);
        });
        refusal(&dir)
    };
    assert!(set_file("absent.safetensors").contains("`absent.safetensors` that it names"));
    for outside in ["../x.safetensors", "/etc/passwd", "a/../../x", "", "."] {
        let message = set_file(outside);
        assert!(message.contains("leads out"), "{outside}: {message}");
    }
    let elsewhere = TempDir::new();
    std::fs::rename(dir.path().join(last), elsewhere.path().join(last)).unwrap();
    set_file(last);
    symlink(elsewhere.path().join(last), dir.path().join(last)).unwrap();
    assert!(refusal(&dir).contains("outside of the model's directory"));
    // Inside, a link is a file like any other.
    std::fs::remove_file(dir.path().join(last)).unwrap();
    let inside = dir.path().join("blob");
    std::fs::rename(elsewhere.path().join(last), &inside).unwrap();
    symlink("blob", dir.path().join(last)).unwrap();
    open(&dir).unwrap();
}

#[test]
fn links_into_a_hub_cache_are_followed() {
    let model = tiny(1);
    let cache = TempDir::new();
    let snapshot = cache.path().join("snapshots/0123abcd");
    let blobs = cache.path().join("blobs");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir(&blobs).unwrap();
    for name in [CONFIG, WEIGHTS] {
        std::fs::copy(model.path().join(name), blobs.join(name)).unwrap();
        symlink(format!("../../blobs/{name}"), snapshot.join(name)).unwrap();
    }
    let directory = HfDirectory::open(&snapshot).unwrap();
    HfModel::open(&directory).unwrap();
    // But not out of it.
    std::fs::remove_file(snapshot.join(WEIGHTS)).unwrap();
    symlink(model.path().join(WEIGHTS), snapshot.join(WEIGHTS)).unwrap();
    let refused = HfModel::open(&directory).unwrap_err().to_string();
    assert!(refused.contains("outside"), "{refused}");
}

#[test]
fn the_index_and_the_files_agree() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let with = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let dir = tiny(2);
        edit(&dir, INDEX, |index| {
            change(index["weight_map"].as_object_mut().unwrap());
        });
        refusal(&dir)
    };
    let wrong = with(&|map| map[name] = json!("model-00001-of-00002.safetensors"));
    assert!(wrong.contains("does not say that"), "{wrong}");
    let unlisted = with(&|map| drop(map.remove(name)));
    assert!(unlisted.contains("does not say that"), "{unlisted}");
    let absent = with(&|map| drop(map.insert("x".into(), map[name].clone())));
    assert!(absent.contains("but the files hold"), "{absent}");

    let dir = tiny(2);
    dir.write(INDEX, r#"{"weight_map": {"a": "x", "a": "y"}}"#);
    assert!(refusal(&dir).contains("`a` appears twice"));
    dir.write(INDEX, r#"{"weight_map": []}"#);
    assert!(refusal(&dir).contains(INDEX));
}

// Row M5, shapes: what is read does not fit the configuration.
#[test]
fn tensors_and_configuration_agree() {
    let load = |change: &dyn Fn(&mut Value)| {
        let dir = tiny(1);
        edit(&dir, CONFIG, change);
        let model = open(&dir)?;
        check_tensors(&model, &model.config()?).map(|()| dir)
    };
    load(&|_| {}).unwrap();
    for (key, value, why) in [
        ("vocab_size", json!(260), "token_embd.weight"),
        ("hidden_size", json!(128), "dimensions"),
        ("intermediate_size", json!(97), "ffn_gate.weight"),
        ("num_key_value_heads", json!(4), "attn_k.weight"),
        (
            "num_hidden_layers",
            json!(3),
            "blk.2.attn_norm.weight` is missing",
        ),
        ("num_hidden_layers", json!(1), "blk.1."),
        ("head_dim", json!(32), "attn_q.weight"),
    ] {
        let message = load(&|c| c[key] = value.clone()).unwrap_err().to_string();
        assert!(message.contains(why), "{key}: {message}");
    }
}

#[test]
fn configurations_that_can_not_be_run() {
    let dir = tiny(1);
    let good = std::fs::read_to_string(dir.path().join(CONFIG)).unwrap();
    for (key, value, why) in [
        (
            "model_type",
            json!("gpt_neox"),
            "`gpt_neox` is not supported; supported: llama",
        ),
        ("model_type", Value::Null, "`` is not supported"),
        (
            "quantization_config",
            json!({"bits": 4}),
            "quantised safetensors",
        ),
        ("torch_dtype", json!("float8_e4m3fn"), "float8_e4m3fn"),
        ("hidden_act", json!("relu2"), "relu2"),
        ("hidden_size", Value::Null, "`hidden_size` is missing"),
        ("hidden_size", json!(0), "`hidden_size` is 0"),
        ("hidden_size", json!(-5), "-5"),
        (
            "num_attention_heads",
            json!(1_000_000),
            "`num_attention_heads` is 1000000",
        ),
        ("num_key_value_heads", json!(3), "evenly"),
        ("vocab_size", json!(1u64 << 60), "`vocab_size`"),
        ("rms_norm_eps", json!(-1), "epsilon"),
        ("head_dim", json!(0), "`head_dim` is 0"),
        ("rope_theta", json!(0), "rope base"),
        (
            "rope_scaling",
            json!({"type": "dynamic", "factor": 2}),
            "`dynamic`",
        ),
        (
            "rope_scaling",
            json!({"type": "linear"}),
            "`factor` is missing",
        ),
    ] {
        dir.write(CONFIG, &good);
        edit(&dir, CONFIG, |c| c[key] = value);
        let message = refusal(&dir);
        assert!(message.contains(why), "{key}: {message}");
        assert!(message.contains("config.json"), "{message}");
    }
    for text in ["", "[]", "nonsense", "{\"model_type\": NaN}"] {
        dir.write(CONFIG, text);
        assert!(refusal(&dir).contains("config.json"), "{text}");
    }
    std::fs::remove_file(dir.path().join(CONFIG)).unwrap();
    assert!(refusal(&dir).contains("no config.json"));
}

#[test]
fn a_head_is_there_or_is_the_embedding_table() {
    let spec = TinyLlama {
        weights: GgmlType::F16,
        value_weights: GgmlType::F16,
        tied: true,
        ..TinyLlama::default()
    };
    let file = TempFile::new(&tiny_llama(&spec));
    let dir = TempDir::new();
    convert_to_hf(&Gguf::open(file.path()).unwrap(), &dir, GgmlType::F32, 1);
    open(&dir).unwrap();
    edit(&dir, CONFIG, |c| c["tie_word_embeddings"] = json!(false));
    assert!(refusal(&dir).contains("`lm_head.weight` is missing"));

    // A copy of the table beside a tied model is not another head.
    let untied = tiny(1);
    assert!(open(&untied).unwrap().tensor("output.weight").is_some());
    edit(&untied, CONFIG, |c| c["tie_word_embeddings"] = json!(true));
    assert!(open(&untied).unwrap().tensor("output.weight").is_none());
}

// Row M6.
#[test]
fn pickles_are_refused_and_code_is_never_run() {
    let dir = tiny(1);
    edit(&dir, CONFIG, |c| {
        c["auto_map"] = json!({"AutoModelForCausalLM": "modeling_x.Llama"});
    });
    // The architecture is known: its code is ours.
    open(&dir).unwrap();
    edit(&dir, CONFIG, |c| c["model_type"] = json!("x"));
    assert!(refusal(&dir).contains("never run"));

    let dir = tiny(1);
    for extension in PICKLE_EXTENSIONS {
        dir.write(&format!("weights.{extension}"), "x");
    }
    open(&dir).unwrap();
    std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
    for extension in PICKLE_EXTENSIONS {
        let message = refusal(&dir);
        assert!(message.contains("pickled weights"), "{message}");
        // The next one alone.
        std::fs::remove_file(dir.path().join(format!("weights.{extension}"))).unwrap();
    }
    assert!(refusal(&dir).contains("neither model.safetensors nor"));
}

#[test]
fn defaults_and_ends_of_output() {
    let dir = tiny(1);
    let defaults = || HfDirectory::open(dir.path()).unwrap().generation_defaults();
    assert_eq!(defaults().unwrap(), GenerationDefaults::default());
    edit(&dir, CONFIG, |c| c["eos_token_id"] = json!(258));
    assert_eq!(defaults().unwrap().eos_ids, [258]);
    let name = "generation_config.json";
    dir.write(name, r#"{"temperature": 0.5}"#);
    let merged = defaults().unwrap();
    assert_eq!(
        (merged.temperature, &merged.eos_ids[..]),
        (Some(0.5), &[258][..])
    );
    dir.write(name, r#"{"eos_token_id": [1, 2]}"#);
    assert_eq!(defaults().unwrap().eos_ids, [1, 2]);
    dir.write(name, r#"{"top_p": 7}"#);
    assert!(defaults().unwrap_err().to_string().contains(name));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is overwritten, opening ends, with a file or an error, and never panics.
    #[test]
    fn damage_never_panics(at in 0usize..400, junk in prop::collection::vec(any::<u8>(), 1..9)) {
        let mut bytes = SafetensorsBuilder::default()
            .tensor("a", "F32", &[2, 3], &[1; 24])
            .tensor("b", "BF16", &[4], &[2; 8])
            .build();
        let at = at % bytes.len();
        let end = (at + junk.len()).min(bytes.len());
        bytes[at..end].copy_from_slice(&junk[..end - at]);
        let file = TempFile::new(&bytes);
        if let Ok(opened) = Safetensors::open(file.path(), 0) {
            for tensor in opened.tensors {
                prop_assert!(tensor.offset + tensor.bytes as u64 <= bytes.len() as u64);
            }
        }
    }
}
