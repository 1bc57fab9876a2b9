//! The real binary on models of every format: GGUF, Hugging Face directories, random weights.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{Daemon, SPATE, Scratch, model};
use serde_json::{Value, json};
use spate_model::testing::hf::{TempDir, convert_to_hf};
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{GgmlType, Gguf};

const CONFIG: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 128,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}"#;

fn spate(arguments: &[&str]) -> Output {
    Command::new(SPATE).args(arguments).output().unwrap()
}

fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn report(arguments: &[&str]) -> String {
    let output = spate(arguments);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    String::from_utf8(output.stdout).unwrap()
}

/// The byte-level vocabulary of a GGUF file, as SmolLM2's own `tokenizer.json` has it.
fn tokenizer_json(gguf: &Gguf) -> Value {
    let metadata = gguf.metadata();
    let strings = |key| metadata.get_array_str(key).unwrap().unwrap();
    let tokens = strings("tokenizer.ggml.tokens");
    let types = metadata.get_array_i32("tokenizer.ggml.token_type").unwrap();
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let control = types.unwrap().into_iter().enumerate().filter(|t| t.1 == 3);
    let added: Vec<Value> = control
        .map(|(id, _)| {
            json!({"id": id, "content": tokens[id], "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, byte_level]},
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": strings("tokenizer.ggml.merges")},
    })
}

/// Writes the text files of a Hugging Face directory.
fn write_text(gguf: &Gguf, dir: &TempDir) {
    let tokens = gguf.metadata().get_array_str("tokenizer.ggml.tokens");
    let tokens = tokens.unwrap().unwrap();
    let token = |key| {
        let id = gguf.metadata().get_u32(key).unwrap().unwrap();
        &tokens[id as usize]
    };
    let config = json!({
        "bos_token": token("tokenizer.ggml.bos_token_id"),
        "eos_token": {"content": token("tokenizer.ggml.eos_token_id")},
        "chat_template": gguf.chat_template().unwrap(),
    });
    dir.write("tokenizer_config.json", config.to_string());
    dir.write("tokenizer.json", tokenizer_json(gguf).to_string());
}

/// Greedy answers to a chat and a completion, without what differs from request to request.
fn answers(daemon: &Daemon) -> Vec<(Value, Value)> {
    let chat = json!({
        "model": "m", "max_tokens": 16, "temperature": 0,
        "messages": [{"role": "user", "content": "Name three primary colours, 1 2 3."}],
    });
    let completion = json!({"model": "m", "max_tokens": 16, "temperature": 0,
        "prompt": "The café at 42 Rue — "});
    [
        ("/v1/chat/completions", chat),
        ("/v1/completions", completion),
    ]
    .map(|(path, body)| {
        let answer = daemon.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        let answer = answer.json();
        (answer["choices"].clone(), answer["usage"].clone())
    })
    .into()
}

#[test]
fn a_converted_model_answers_like_the_original() {
    let gguf = Gguf::open(model()).unwrap();
    let dir = TempDir::new();
    convert_to_hf(&gguf, &dir, GgmlType::F32, 2);
    write_text(&gguf, &dir);
    let exact = ["--cpu-mode", "exact"];
    let original = answers(&Daemon::start(&exact));
    let converted = Daemon::start_with(dir.path(), &exact);
    assert_eq!(answers(&converted), original);
    let models = converted.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "m");
}

#[test]
fn random_weights_need_only_a_configuration() {
    let dir = TempDir::new();
    dir.write("config.json", CONFIG);
    let path = dir.path().to_str().unwrap();
    let refused = complaint(&spate(&["serve", path, "--port", "0"]));
    assert!(
        refused.contains("neither model.safetensors nor"),
        "{refused}"
    );

    let daemon = Daemon::start_with(dir.path(), &["--load-format", "dummy"]);
    let body = json!({"model": "m", "prompt": "héllo", "max_tokens": 12, "temperature": 0,
        "logprobs": 1});
    let answer = daemon.post("/v1/completions", &body).json();
    assert_eq!(answer["usage"]["prompt_tokens"], 6, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 12, "{answer}");
    let logprobs = &answer["choices"][0]["logprobs"]["token_logprobs"];
    assert!(logprobs.as_array().unwrap().iter().all(Value::is_number));
}

#[test]
fn a_model_may_recommend_how_to_sample_and_where_to_stop() {
    let file = TempFile::new(&tiny_llama(&TinyLlama {
        weights: GgmlType::F16,
        value_weights: GgmlType::F16,
        ..TinyLlama::default()
    }));
    let gguf = Gguf::open(file.path()).unwrap();
    let dir = TempDir::new();
    convert_to_hf(&gguf, &dir, GgmlType::F16, 1);
    write_text(&gguf, &dir);
    // One choice at each step is what greedy sampling has.
    dir.write(
        "generation_config.json",
        r#"{"temperature": 1.5, "top_k": 1}"#,
    );
    let ask = |daemon: &Daemon, temperature: Option<f32>| {
        let mut body = json!({"model": "m", "prompt": "abc", "max_tokens": 16, "seed": 5});
        if let Some(temperature) = temperature {
            body["temperature"] = temperature.into();
        }
        let answer = daemon.post("/v1/completions", &body).json();
        answer["choices"][0].clone()
    };
    let daemon = Daemon::start_with(dir.path(), &[]);
    let greedy = ask(&daemon, Some(0.0));
    assert_eq!(greedy["text"], ask(&daemon, None)["text"]);
    assert_eq!(greedy["finish_reason"], "length");

    // Whatever comes first is now the end.
    let tokens = json!({"model": "m", "prompt": greedy["text"]});
    let ids = daemon.post("/tokenize", &tokens).json();
    let first = ids["tokens"][0].clone();
    drop(daemon);
    let text = json!({"top_k": 1, "eos_token_id": [257, first]});
    dir.write("generation_config.json", text.to_string());
    let stopped = ask(&Daemon::start_with(dir.path(), &[]), None);
    assert_eq!(stopped["finish_reason"], "stop", "{stopped}");

    dir.write("generation_config.json", r#"{"top_p": 2}"#);
    let refused = complaint(&spate(&[
        "serve",
        dir.path().to_str().unwrap(),
        "--port",
        "0",
    ]));
    assert!(
        refused.contains("generation_config.json: top_p is 2"),
        "{refused}"
    );
}

#[test]
fn what_is_no_model_is_refused_with_a_reason() {
    let dir = Scratch::new();
    let check = |path: &Path, why: &str| {
        let message = complaint(&spate(&["serve", path.to_str().unwrap(), "--port", "0"]));
        assert!(message.contains(why), "{message}");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
    };
    check(&dir.write("a/pytorch_model.bin", b"x"), "pickled weights");
    dir.write("a/config.json", CONFIG.as_bytes());
    check(&dir.path().join("a"), "pickled weights");
    check(&dir.path().join("a/config.json"), "name its directory");
    check(
        &dir.write("b/model.safetensors", b"x"),
        "name its directory",
    );
    check(&dir.write("c.gguf", b"GGUF"), "at byte 4");

    let model = tiny_llama(&TinyLlama::default());
    let cut = dir.write("cut.gguf", &model[..model.len() / 2]);
    check(&cut, "at byte ");
    // A directory without a tokenizer.
    let file = TempFile::new(&model);
    let hf = TempDir::new();
    convert_to_hf(&Gguf::open(file.path()).unwrap(), &hf, GgmlType::F32, 1);
    check(hf.path(), "holds no tokenizer.json");
    // Row M7.
    hf.write("tokenizer.json", "{\"model\": 5}");
    check(hf.path(), "tokenizer.json");
    write_text(&Gguf::open(file.path()).unwrap(), &hf);
    hf.write("chat_template.jinja", "{% if %}");
    check(hf.path(), "chat template does not compile");
    std::fs::remove_file(hf.path().join("chat_template.jinja")).unwrap();
    // Row M5: a token for which there are no logits.
    let tokenizer = hf.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let mut extra = json["added_tokens"][0].clone();
    (extra["id"], extra["content"]) = (json!(259), json!("<extra>"));
    json["added_tokens"].as_array_mut().unwrap().push(extra);
    hf.write("tokenizer.json", json.to_string());
    check(hf.path(), "260 tokens, but logits for only 259");
}

// Row M8: nothing of the file is needed once it is loaded.
#[test]
fn a_file_that_shrinks_while_it_is_served_changes_nothing() {
    let bytes = tiny_llama(&TinyLlama::default());
    let file = TempFile::new(&bytes);
    let daemon = Daemon::start_with(file.path(), &[]);
    let body = json!({"model": "m", "prompt": "abc", "max_tokens": 8, "temperature": 0,
        "ignore_eos": true});
    let ask = || daemon.post("/v1/completions", &body).json()["choices"].clone();
    let before = ask();
    let handle = std::fs::File::options().write(true).open(file.path());
    handle.unwrap().set_len(100).unwrap();
    assert_eq!(ask(), before);
    assert_eq!(daemon.get("/health").status, 200);
}

#[test]
fn inspect_says_what_a_model_is_and_whether_it_fits() {
    let dir = TempDir::new();
    dir.write("config.json", CONFIG);
    let path = dir.path().to_str().unwrap();
    let inspect =
        |more: &[&str]| report(&[&["inspect", path, "--load-format", "dummy"], more].concat());
    let text = inspect(&["--memory", "1GiB"]);
    // Two tables of 600 x 128; per layer 128 x (128 + 64 + 64 + 128 + 3 x 256); five norms.
    let parameters = 2 * 600 * 128 + 2 * 128 * 1152 + 5 * 128;
    assert!(
        text.contains(&format!("{:.1} k", f64::from(parameters) / 1e3)),
        "{text}"
    );
    for part in [
        "llama, 2 layers",
        "4 heads of 32 (2 for keys and values)",
        "vocabulary 600, context 512",
        "BF16       16 with",
        "F32         5 with",
        "8 sequences of 512 tokens",
        "fits: it needs",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let small = inspect(&["--memory", "16MiB", "--concurrency", "1000"]);
    assert!(
        small.contains("does not fit, because the KV cache needs"),
        "{small}"
    );
    let tiny = inspect(&["--memory", "100KiB", "--context", "16"]);
    assert!(tiny.contains("does not fit, because the weights"), "{tiny}");
    assert!(inspect(&[]).contains("fits: it needs"));
    let long = spate(&[
        "inspect",
        path,
        "--load-format",
        "dummy",
        "--context",
        "513",
    ]);
    assert!(complaint(&long).contains("1 to 512 tokens"));
}

#[test]
fn inspect_reads_a_gguf_file() {
    let text = report(&["inspect", model().to_str().unwrap()]);
    for part in ["GGUF", "llama, 30 layers", "134.5 M", "Q4_1", "CPU, fast"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
