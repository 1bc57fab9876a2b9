//! Every field: what passes, what is refused, and that the refusal names the field.

use serde_json::{Value, json};

use crate::harness::{MAX_MODEL_LEN, Server, VOCAB, start_default};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A cheap request that passes, with `field` set to `value`.
fn request(path: &str, field: &str, value: Value) -> Value {
    let mut body = match path {
        CHAT => json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
        _ => json!({"prompt": "hi", "max_tokens": 1}),
    };
    body[field] = value;
    body
}

async fn passes(server: &Server, path: &str, field: &str, value: Value) {
    let reply = server
        .post(path, &request(path, field, value.clone()))
        .await;
    assert_eq!(
        reply.status,
        200,
        "{path} {field}={value}: {}",
        reply.text()
    );
}

async fn refused(server: &Server, path: &str, field: &str, value: Value) -> Value {
    let reply = server
        .post(path, &request(path, field, value.clone()))
        .await;
    assert_eq!(
        reply.status,
        400,
        "{path} {field}={value}: {}",
        reply.text()
    );
    let error = reply.error();
    assert_eq!(error["type"], "invalid_request_error");
    let param = error["param"].as_str().unwrap_or_default();
    assert!(param.starts_with(field), "{path} {field}={value}: {error}");
    assert!(
        error["message"].as_str().unwrap().contains(field),
        "{error}"
    );
    error
}

/// A field: name, what passes, what is refused. Null always passes.
type Row = (&'static str, Vec<Value>, Vec<Value>);

/// A number field, which refuses other types and what is far out of range too.
fn number(name: &'static str, good: Vec<Value>, mut bad: Vec<Value>) -> Row {
    bad.extend([json!("1"), json!(true), json!([1]), json!({}), json!(1e39)]);
    (name, good, bad)
}

/// A number field that refuses fractions too.
fn integer(name: &'static str, good: Vec<Value>, bad: Vec<Value>) -> Row {
    let mut row = number(name, good, bad);
    row.2.push(json!(1.5));
    row
}

fn flag(name: &'static str) -> Row {
    let bad = vec![json!(1), json!("true"), json!([])];
    (name, vec![json!(true), json!(false)], bad)
}

fn sampling_fields() -> Vec<Row> {
    let max = json!(i64::MAX);
    vec![
        number(
            "temperature",
            vec![json!(0), json!(0.7), json!(2)],
            vec![json!(-0.001), json!(2.001), max.clone()],
        ),
        number(
            "top_p",
            vec![json!(0.001), json!(1)],
            vec![json!(0), json!(1.001), json!(-1), max.clone()],
        ),
        number(
            "min_p",
            vec![json!(0), json!(1)],
            vec![json!(-0.01), json!(1.01)],
        ),
        number(
            "repetition_penalty",
            vec![json!(0.01), json!(10)],
            vec![json!(0), json!(10.1)],
        ),
        number(
            "presence_penalty",
            vec![json!(-2), json!(2)],
            vec![json!(-2.01), json!(2.01)],
        ),
        number(
            "frequency_penalty",
            vec![json!(-2), json!(2)],
            vec![json!(-2.01), json!(2.01)],
        ),
        integer(
            "top_k",
            vec![json!(-1), json!(0), json!(1), json!(40.0)],
            vec![json!(-2), max.clone()],
        ),
        integer(
            "n",
            vec![json!(1), json!(3)],
            vec![json!(0), json!(-1), json!(129), json!(100), max.clone()],
        ),
        integer(
            "max_tokens",
            vec![json!(1), json!(7)],
            vec![json!(0), json!(-1), json!(MAX_MODEL_LEN), max.clone()],
        ),
        integer(
            "min_tokens",
            vec![json!(0), json!(1)],
            vec![json!(-1), json!(2), max.clone()],
        ),
        integer(
            "prompt_logprobs",
            vec![json!(0), json!(20)],
            vec![json!(-1), json!(21), max.clone()],
        ),
        integer(
            "priority",
            vec![json!(-5), json!(i32::MAX)],
            vec![json!(1u64 << 31), max],
        ),
        integer(
            "seed",
            vec![json!(i64::MIN), json!(i64::MAX), json!(0)],
            vec![json!(u64::MAX)],
        ),
        integer("best_of", vec![json!(1)], vec![json!(2), json!(0)]),
        (
            "logit_bias",
            vec![json!({}), json!({"0": 100, "5": -100.0})],
            vec![
                json!([]),
                json!("x"),
                json!({"-1": 1}),
                json!({VOCAB.to_string(): 1}),
                json!({"a": 1}),
                json!({"01": 1}),
                json!({"+1": 1}),
                json!({"1": 100.1}),
                json!({"1": "1"}),
                json!({"1": null}),
                json!({"99999999999": 1}),
            ],
        ),
    ]
}

fn stop_and_other_fields() -> Vec<Row> {
    let texts = |len| json!(vec!["x"; len]);
    let mut table = vec![
        (
            "stop",
            vec![json!("a"), json!(["a", "b"]), json!([]), texts(64)],
            vec![
                json!(""),
                json!(["a", ""]),
                texts(65),
                json!(1),
                json!([1]),
                json!("x".repeat(1025)),
                json!([null]),
            ],
        ),
        (
            "stop_token_ids",
            vec![json!([]), json!([0, VOCAB - 1])],
            vec![
                json!([VOCAB]),
                json!([-1]),
                json!(["1"]),
                json!(1),
                json!([1.5]),
                json!(vec![0; 1025]),
            ],
        ),
        (
            "cache_salt",
            vec![json!("tenant"), json!("é".repeat(1024))],
            vec![
                json!(""),
                json!("a".repeat(1025)),
                json!("a\u{0}"),
                json!("a\nb"),
                json!(1),
            ],
        ),
        (
            "response_format",
            vec![json!({"type": "text"})],
            vec![
                json!({"type": "json_object"}),
                json!({"type": "json_schema"}),
                json!({"type": "x"}),
                json!({}),
                json!("text"),
            ],
        ),
        (
            "spaces_between_special_tokens",
            vec![json!(true)],
            vec![json!(false)],
        ),
        ("use_beam_search", vec![json!(false)], vec![json!(true)]),
        ("length_penalty", vec![json!(1.0)], vec![json!(0.5)]),
        ("bad_words", vec![json!([])], vec![json!(["x"])]),
        ("allowed_token_ids", vec![json!([])], vec![json!([1])]),
        (
            "stream_options",
            vec![],
            vec![json!({"include_usage": true}), json!(1)],
        ),
    ];
    table.extend(
        [
            "ignore_eos",
            "skip_special_tokens",
            "include_stop_str_in_output",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "stream",
            "add_special_tokens",
        ]
        .map(flag),
    );
    let unsupported = [
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "truncate_prompt_tokens",
        "logprob_token_ids",
    ];
    let set = || vec![json!({"a": 1}), json!(5), json!("x")];
    table.extend(unsupported.map(|name| (name, vec![], set())));
    let ignored = [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "some_unknown_field",
    ];
    table.extend(ignored.map(|name| (name, set(), vec![])));
    table
}

async fn check(server: &Server, path: &str, table: Vec<Row>) {
    for (field, good, bad) in table {
        passes(server, path, field, Value::Null).await;
        for value in good {
            passes(server, path, field, value).await;
        }
        for value in bad {
            refused(server, path, field, value).await;
        }
    }
}

#[tokio::test]
async fn a1_fields_of_both_endpoints() {
    let server = start_default().await;
    let canary = server.canary().await;
    for path in [CHAT, COMPLETIONS] {
        check(&server, path, sampling_fields()).await;
        check(&server, path, stop_and_other_fields()).await;
    }
    server.wait_idle().await;
    assert_eq!(server.canary().await, canary);
}

#[tokio::test]
async fn a1_numbers_that_json_does_not_have() {
    let server = start_default().await;
    for number in ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"] {
        for field in ["temperature", "n", "seed", "presence_penalty"] {
            let body = format!(r#"{{"prompt": "hi", "{field}": {number}}}"#);
            let reply = server.post_raw(COMPLETIONS, body.as_bytes()).await;
            assert_eq!(reply.status, 400, "{field} {number}");
            assert_eq!(reply.error()["param"], field);
        }
    }
}

#[tokio::test]
async fn fields_of_chat() {
    let server = start_default().await;
    let table = vec![
        (
            "logprobs",
            vec![json!(true), json!(false)],
            vec![json!(1), json!("true")],
        ),
        (
            "top_logprobs",
            vec![json!(0)],
            vec![json!(1), json!(21), json!(-1), json!("1")],
        ),
        (
            "max_completion_tokens",
            vec![json!(1)],
            vec![json!(0), json!(1e39), json!("1")],
        ),
        (
            "tools",
            vec![json!([])],
            vec![
                json!([{"type": "function", "function": {"name": "f"}}]),
                json!({}),
                json!([1]),
            ],
        ),
        (
            "tool_choice",
            vec![json!("none"), json!("auto")],
            vec![
                json!("required"),
                json!("sometimes"),
                json!(1),
                json!({"type": "function", "function": {"name": "f"}}),
            ],
        ),
        (
            "parallel_tool_calls",
            vec![json!(true), json!(false)],
            vec![json!(1)],
        ),
        (
            "chat_template_kwargs",
            vec![json!({}), json!({"enable_thinking": false})],
            vec![json!("x")],
        ),
        (
            "continue_final_message",
            vec![json!(true), json!(false)],
            vec![json!("x")],
        ),
        (
            "add_generation_prompt",
            vec![json!(true), json!(false)],
            vec![json!("x")],
        ),
        ("chat_template", vec![], vec![json!("{{ x }}")]),
        ("echo", vec![json!(false)], vec![json!(true)]),
        ("modalities", vec![json!(["text"])], vec![json!(["audio"])]),
        ("reasoning_effort", vec![], vec![json!("high")]),
        ("functions", vec![json!([])], vec![json!([{"name": "f"}])]),
        ("audio", vec![], vec![json!({"voice": "x"})]),
    ];
    check(&server, CHAT, table).await;
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": true, "top_logprobs": 20});
    assert_eq!(server.post(CHAT, &body).await.status, 200);
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let twice = json!([tool, tool]);
    assert!(
        refused(&server, CHAT, "tools", twice).await["message"]
            .as_str()
            .unwrap()
            .contains("again")
    );
    let unused = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": [tool], "tool_choice": "none"});
    assert_eq!(server.post(CHAT, &unused).await.status, 200);
    // The newer spelling of the limit wins.
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "max_completion_tokens": 2, "ignore_eos": true});
    assert_eq!(
        server.post(CHAT, &body).await.json()["usage"]["completion_tokens"],
        2
    );
}

#[tokio::test]
async fn fields_of_completions() {
    let server = start_default().await;
    let table = vec![
        (
            "logprobs",
            vec![json!(0), json!(20)],
            vec![json!(true), json!(21), json!(-1)],
        ),
        ("echo", vec![json!(true), json!(false)], vec![json!(1)]),
        ("suffix", vec![json!("")], vec![json!("x")]),
    ];
    check(&server, COMPLETIONS, table).await;
    for good in [
        json!("x"),
        json!(["x", "y"]),
        json!([1, 2]),
        json!([[1], [2, 3]]),
        json!(["x", [1]]),
    ] {
        passes(&server, COMPLETIONS, "prompt", good).await;
    }
    for bad in [
        Value::Null,
        json!(""),
        json!([]),
        json!([[]]),
        json!([""]),
        json!(1),
        json!({}),
        json!([1, "x"]),
        json!([-1]),
        json!([VOCAB]),
        json!([1.5]),
        json!([[VOCAB]]),
        json!([null]),
        json!([true]),
        json!(vec!["x"; 129]),
        json!([1e39]),
    ] {
        refused(&server, COMPLETIONS, "prompt", bad).await;
    }
    for extra in [
        json!({"echo": true, "logprobs": 1}),
        json!({"prompt_logprobs": 1}),
    ] {
        let mut body = json!({"prompt": "x", "max_tokens": 1, "stream": true});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        assert_eq!(server.post(COMPLETIONS, &body).await.status, 400);
    }
}

#[tokio::test]
async fn a4_messages() {
    let server = start_default().await;
    let text = |role: &str| json!([{"role": role, "content": "x"}]);
    let call = |arguments: Value| {
        json!([{"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}])
    };
    for good in [
        text("system"),
        text("developer"),
        text("user"),
        text("assistant"),
        text("tool"),
        json!([{"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"}]),
        json!([{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        json!([{"role": "user", "content": ["x"]}]),
        json!([{"role": "user", "content": ""}]),
        call(json!("{\"a\": 1}")),
        call(json!("")),
        call(json!({})),
    ] {
        passes(&server, CHAT, "messages", good).await;
    }
    let part = |part: Value| json!([{"role": "user", "content": [part]}]);
    for bad in [
        Value::Null,
        json!([]),
        json!("x"),
        json!({}),
        json!(["x"]),
        json!([{}]),
        text("king"),
        json!([{"role": 1, "content": "x"}]),
        json!([{"role": "user"}]),
        json!([{"role": "user", "content": null}]),
        json!([{"role": "user", "content": 1}]),
        json!([{"role": "user", "content": "x", "name": 1}]),
        part(json!(1)),
        part(json!({})),
        part(json!({"type": "text"})),
        part(json!({"type": "text", "text": 1})),
        part(json!({"type": "hologram"})),
        call(json!("not json")),
        call(json!("[1]")),
        call(json!(1)),
        json!([{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
        Value::from(vec![json!({"role": "user", "content": "x"}); 4097]),
    ] {
        refused(&server, CHAT, "messages", bad).await;
    }
    let parts = vec![json!({"type": "text", "text": ""}); 100_000];
    refused(
        &server,
        CHAT,
        "messages",
        json!([{"role": "user", "content": parts}]),
    )
    .await;
}

#[tokio::test]
async fn a14_media_is_refused_by_name() {
    let server = start_default().await;
    for kind in ["image_url", "input_audio", "video_url", "file", "file_url"] {
        let part = json!({"type": kind, kind: {"url": "http://127.0.0.1:9/x.png"}});
        let error = refused(
            &server,
            CHAT,
            "messages",
            json!([{"role": "user", "content": [part]}]),
        )
        .await;
        assert!(error["message"].as_str().unwrap().contains(kind));
    }
}
