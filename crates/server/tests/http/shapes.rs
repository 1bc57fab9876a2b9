//! The responses' shapes, as clients check them.

use serde_json::{Value, json};

use crate::harness::{
    EOS, MAX_MODEL_LEN, MODEL, Reply, Server, ascii_only, only, start_default, token,
};

fn ok(reply: Reply) -> Value {
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(reply.headers["content-type"].starts_with("application/json"));
    reply.json()
}

/// Takes out what differs from run to run, after checking that it is there.
fn take_volatile(body: &mut Value, prefix: &str) {
    let id = body["id"].take();
    assert!(id.as_str().unwrap().starts_with(prefix), "{id}");
    assert!(body["created"].take().as_u64().unwrap() > 1_700_000_000);
}

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

#[tokio::test]
async fn chat_completion() {
    let server = start_default().await;
    let body = json!({
        "model": MODEL, "messages": user("hi"), "max_tokens": 3, "logit_bias": only('x'),
    });
    let mut reply = ok(server.post("/v1/chat/completions", &body).await);
    take_volatile(&mut reply, "chatcmpl-");
    // <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n
    let prompt = 1 + 5 + 2 + 1 + 1 + 1 + 10;
    let expected = json!({
        "id": null, "object": "chat.completion", "created": null, "model": MODEL,
        "system_fingerprint": "fp_sim",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "xxx", "refusal": null},
            "logprobs": null, "finish_reason": "length", "stop_reason": null,
        }],
        "usage": {
            "prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    });
    assert_eq!(reply, expected);
}

#[tokio::test]
async fn text_completion() {
    let server = start_default().await;
    let body = json!({"prompt": "hi", "logit_bias": only('y')});
    let mut reply = ok(server.post("/v1/completions", &body).await);
    take_volatile(&mut reply, "cmpl-");
    let expected = json!({
        "id": null, "object": "text_completion", "created": null, "model": MODEL,
        "system_fingerprint": "fp_sim",
        // 16 is OpenAI's default for max_tokens here.
        "choices": [{
            "index": 0, "text": "y".repeat(16), "logprobs": null,
            "finish_reason": "length", "stop_reason": null,
        }],
        "usage": {
            "prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    });
    assert_eq!(reply, expected);
}

#[tokio::test]
async fn chat_stream() {
    let server = start_default().await;
    let body = json!({
        "model": "org/sim", "messages": user("hi"), "max_tokens": 5, "logit_bias": only('x'),
        "stream": true, "stream_options": {"include_usage": true},
    });
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200);
    assert!(reply.headers["content-type"].starts_with("text/event-stream"));
    assert_eq!(reply.headers["cache-control"], "no-cache");
    let mut events = reply.events();
    let (id, created) = (events[0]["id"].clone(), events[0]["created"].clone());
    for event in &mut events {
        assert_eq!((&event["id"], &event["created"]), (&id, &created));
        take_volatile(event, "chatcmpl-");
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["model"], "org/sim");
        assert_eq!(event["system_fingerprint"], "fp_sim");
    }
    let choice = |delta: Value, finish: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]);
    let first = events.remove(0);
    assert_eq!(
        first["choices"],
        choice(json!({"role": "assistant", "content": ""}), Value::Null)
    );
    assert_eq!(first.get("usage"), Some(&Value::Null));
    let usage = events.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 5);
    let last = events.pop().unwrap();
    assert_eq!(last["choices"], choice(json!({}), "length".into()));
    let text: String = events
        .iter()
        .map(|event| {
            let text = event["choices"][0]["delta"]["content"].as_str().unwrap();
            assert_eq!(
                event["choices"],
                choice(json!({"content": text}), Value::Null)
            );
            text
        })
        .collect();
    assert_eq!(text, "xxxxx");
}

#[tokio::test]
async fn usage_in_every_chunk_counts_up() {
    let server = start_default().await;
    let body = json!({
        "prompt": "abc", "max_tokens": 6, "ignore_eos": true, "logit_bias": ascii_only(), "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    });
    let events = server.post("/v1/completions", &body).await.events();
    let counts: Vec<_> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert!(
        counts.is_sorted() && counts.last() == Some(&6),
        "{counts:?}"
    );
    let plain = json!({"prompt": "abc", "max_tokens": 2, "ignore_eos": true, "stream": true});
    for event in server.post("/v1/completions", &plain).await.events() {
        assert_eq!(event.get("usage"), None);
    }
}

#[tokio::test]
async fn a_stream_says_what_the_whole_response_says() {
    let server = start_default().await;
    // Random bytes as tokens: characters break across tokens, and some bytes are no UTF-8 at all.
    for seed in 0..5 {
        let mut body = json!({
            "prompt": ["one", "another"], "n": 2, "max_tokens": 60, "seed": seed, "ignore_eos": true,
            "stop": ["zz", "a\u{fffd}"], "return_token_ids": true,
        });
        let whole = ok(server.post("/v1/completions", &body).await);
        body["stream"] = true.into();
        let events = server.post("/v1/completions", &body).await.events();
        let mut texts = vec![String::new(); 4];
        let mut ids = vec![Vec::new(); 4];
        let mut ends = vec![Value::Null; 4];
        for event in &events {
            let choice = &event["choices"][0];
            let index = choice["index"].as_u64().unwrap() as usize;
            assert!(ends[index].is_null(), "something follows the finish reason");
            texts[index].push_str(choice["text"].as_str().unwrap());
            ids[index].extend(
                choice["token_ids"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .cloned(),
            );
            ends[index] = choice["finish_reason"].clone();
        }
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], texts[index]);
            assert_eq!(choice["token_ids"], Value::from(ids[index].clone()));
            assert_eq!(choice["finish_reason"], ends[index]);
        }
    }
}

#[tokio::test]
async fn several_prompts_give_choices_in_order() {
    let server = start_default().await;
    let alone = |prompt: Value| json!({"prompt": prompt, "max_tokens": 8, "seed": 7, "n": 2, "ignore_eos": true, "return_token_ids": true});
    let prompts = [json!("first"), json!([10, 11, 12])];
    let together = ok(server.post("/v1/completions", &alone(json!(prompts))).await);
    assert_eq!(together["usage"]["prompt_tokens"], 5 + 3);
    assert_eq!(together["usage"]["completion_tokens"], 4 * 8);
    for (i, prompt) in prompts.iter().enumerate() {
        let single = ok(server.post("/v1/completions", &alone(prompt.clone())).await);
        for n in 0..2 {
            let choice = &together["choices"][2 * i + n];
            assert_eq!(choice["index"], 2 * i + n);
            assert_eq!(choice["token_ids"], single["choices"][n]["token_ids"]);
            assert_eq!(
                choice["prompt_token_ids"],
                single["choices"][n]["prompt_token_ids"]
            );
        }
    }
}

#[tokio::test]
async fn a_repeated_prompt_reports_cached_tokens() {
    let server = start_default().await;
    let body =
        json!({"prompt": "p".repeat(100), "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    let cold = ok(server.post("/v1/completions", &body).await);
    let warm = ok(server.post("/v1/completions", &body).await);
    assert_eq!(cold["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(warm["usage"]["prompt_tokens_details"]["cached_tokens"], 96);
    assert_eq!(cold["choices"], warm["choices"]);
}

#[tokio::test]
async fn stop_strings_and_ids_end_the_text() {
    let server = start_default().await;
    let ask = async |extra: Value| {
        let mut body = json!({"prompt": "hi", "max_tokens": 12, "logit_bias": only('x')});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let reply = ok(server.post("/v1/completions", &body).await);
        let choice = &reply["choices"][0];
        (
            choice["text"].as_str().unwrap().to_owned(),
            choice["finish_reason"].as_str().unwrap().to_owned(),
            choice["stop_reason"].clone(),
            reply["usage"]["completion_tokens"].as_u64().unwrap(),
        )
    };
    let stopped =
        |text: &str, why: Value, tokens| (text.to_owned(), "stop".to_owned(), why, tokens);
    let x = token('x');
    assert_eq!(
        ask(json!({"stop": "xxx"})).await,
        stopped("", "xxx".into(), 3)
    );
    assert_eq!(
        ask(json!({"stop": ["no", "xx"], "include_stop_str_in_output": true})).await,
        stopped("xx", "xx".into(), 2)
    );
    assert_eq!(
        ask(json!({"stop": "xx", "min_tokens": 5})).await,
        stopped("xxxxx", "xx".into(), 7)
    );
    assert_eq!(
        ask(json!({"stop_token_ids": [x]})).await,
        stopped("", x.into(), 1)
    );
    assert_eq!(
        ask(json!({"stop_token_ids": [x], "include_stop_str_in_output": true})).await,
        stopped("x", x.into(), 1)
    );
    let eos = json!({EOS.to_string(): 100});
    assert_eq!(
        ask(json!({"logit_bias": eos})).await,
        stopped("", Value::Null, 1)
    );
    let (text, finish, _, tokens) = ask(json!({"logit_bias": eos, "ignore_eos": true})).await;
    assert_eq!((&*text, &*finish, tokens), ("", "length", 12));
    let (text, ..) =
        ask(json!({"logit_bias": eos, "ignore_eos": true, "max_tokens": 2, "skip_special_tokens": false})).await;
    assert_eq!(text, "<|im_end|><|im_end|>");
}

#[tokio::test]
async fn chat_logprobs() {
    let server = start_default().await;
    let body = json!({
        "messages": user("hi"), "max_tokens": 4, "logprobs": true, "top_logprobs": 2, "ignore_eos": true,
        "temperature": 0, "logit_bias": ascii_only(),
    });
    let reply = ok(server.post("/v1/chat/completions", &body).await);
    let choice = &reply["choices"][0];
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 4);
    let text: String = content
        .iter()
        .map(|t| t["token"].as_str().unwrap())
        .collect();
    assert_eq!(choice["message"]["content"], text);
    for token in content {
        assert_eq!(
            token["bytes"],
            json!(token["token"].as_str().unwrap().as_bytes())
        );
        assert!(token["logprob"].as_f64().unwrap() < 0.0);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert!(top[0]["logprob"].as_f64() > top[1]["logprob"].as_f64());
    }
    // The stream carries the same ones.
    let mut body = body;
    body["stream"] = true.into();
    let events = server.post("/v1/chat/completions", &body).await.events();
    let streamed: Vec<_> = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(&streamed, content);
}

#[tokio::test]
async fn completion_logprobs_and_echo() {
    let server = start_default().await;
    let body = json!({
        "prompt": "héy", "max_tokens": 2, "logprobs": 1, "echo": true, "logit_bias": only('x'),
        "prompt_logprobs": 0,
    });
    let reply = ok(server.post("/v1/completions", &body).await);
    let choice = &reply["choices"][0];
    assert_eq!(choice["text"], "héyxx");
    let logprobs = &choice["logprobs"];
    assert_eq!(
        logprobs["tokens"],
        json!(["h", "bytes:\\xc3", "bytes:\\xa9", "y", "x", "x"])
    );
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4, 5]));
    let values = logprobs["token_logprobs"].as_array().unwrap();
    let top = logprobs["top_logprobs"].as_array().unwrap();
    assert!(values[0].is_null() && top[0].is_null());
    for (i, token) in logprobs["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .skip(1)
    {
        let row = top[i].as_object().unwrap();
        assert_eq!(&row[token.as_str().unwrap()], &values[i]);
        assert!((1..=2).contains(&row.len()));
    }
    let prompt = choice["prompt_logprobs"].as_array().unwrap();
    assert_eq!(prompt.len(), 4);
    assert!(prompt[0].is_null());
    let y = &prompt[3][token('y').to_string()];
    assert_eq!(y["decoded_token"], "y");
    assert_eq!(y["logprob"], values[3]);
    assert!(y["rank"].as_u64().unwrap() >= 1);
    // Tokens as ids.
    let body = json!({"prompt": "a", "max_tokens": 1, "logprobs": 0, "return_tokens_as_token_ids": true, "logit_bias": only('x')});
    let reply = ok(server.post("/v1/completions", &body).await);
    let name = format!("token_id:{}", token('x'));
    assert_eq!(reply["choices"][0]["logprobs"]["tokens"], json!([name]));
}

#[tokio::test]
async fn chat_prompts_are_rendered_as_asked() {
    let server = start_default().await;
    let tokens = async |extra: Value| {
        let mut body = json!({"max_tokens": 1, "return_token_ids": true});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let reply = ok(server.post("/v1/chat/completions", &body).await);
        let ids = json!({"tokens": reply["prompt_token_ids"]});
        let text = ok(server.post("/detokenize", &ids).await);
        text["prompt"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        tokens(json!({"messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]})).await,
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    );
    let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "so,"}]);
    assert_eq!(
        tokens(json!({"messages": turns, "continue_final_message": true})).await,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nso,"
    );
    assert_eq!(
        tokens(json!({"messages": turns, "add_generation_prompt": false})).await,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nso,<|im_end|>\n"
    );
}

#[tokio::test]
async fn models_tokenize_detokenize_version() {
    let server = start_default().await;
    let models = ok(server.get("/v1/models").await);
    assert_eq!(models["object"], "list");
    assert_eq!(
        models["data"][0],
        json!({"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "spate",
               "root": MODEL, "parent": null, "max_model_len": MAX_MODEL_LEN})
    );
    assert_eq!(models["data"][1]["id"], "org/sim");
    assert_eq!(ok(server.get("/v1/models/org/sim").await)["id"], "org/sim");
    assert_eq!(
        ok(server.get("/v1/models/org%2Fsim").await)["id"],
        "org/sim"
    );
    let missing = server.get("/v1/models/gpt-4").await;
    assert_eq!(
        (missing.status, &missing.error()["code"]),
        (404, &json!("model_not_found"))
    );

    let text = json!({"prompt": "aé<|im_end|>", "return_token_strs": true});
    let tokens = ok(server.post("/v1/tokenize", &text).await);
    let ids = [token('a'), 3 + 0xc3, 3 + 0xa9, EOS];
    assert_eq!(
        tokens,
        json!({"count": 4, "max_model_len": MAX_MODEL_LEN, "tokens": ids,
               "token_strs": ["a", "\u{fffd}", "\u{fffd}", "<|im_end|>"]})
    );
    let back = ok(server.post("/detokenize", &json!({"tokens": ids})).await);
    assert_eq!(back, json!({"prompt": "aé<|im_end|>"}));
    let chat = ok(server
        .post("/tokenize", &json!({"messages": user("hi")}))
        .await);
    assert_eq!(chat["count"], 21);
    assert_eq!(
        ok(server.get("/version").await),
        json!({"version": env!("CARGO_PKG_VERSION")})
    );
}

#[tokio::test]
async fn same_seed_same_text_whatever_runs_beside() {
    let server: Server = start_default().await;
    let body = |prompt: &str, seed: i64| json!({"prompt": prompt, "seed": seed, "max_tokens": 32, "ignore_eos": true, "return_token_ids": true});
    let alone = ok(server.post("/v1/completions", &body("p", -5)).await);
    let noise = futures(
        &server,
        (0..6).map(|i| body("noise", i)).chain([body("p", -5)]),
    )
    .await;
    assert_eq!(noise.last().unwrap()["choices"], alone["choices"]);
    let unseeded = json!({"prompt": "p", "max_tokens": 32, "ignore_eos": true, "n": 2});
    let first = ok(server.post("/v1/completions", &unseeded).await);
    let second = ok(server.post("/v1/completions", &unseeded).await);
    assert_ne!(first["choices"], second["choices"]);
}

async fn futures(server: &Server, bodies: impl Iterator<Item = Value>) -> Vec<Value> {
    let requests: Vec<_> = bodies
        .map(|body| {
            let addr = server.addr;
            tokio::spawn(async move {
                let body = serde_json::to_vec(&body).unwrap();
                crate::harness::post_to(addr, "/v1/completions", &body).await
            })
        })
        .collect();
    let mut replies = Vec::new();
    for request in requests {
        replies.push(ok(request.await.unwrap()));
    }
    replies
}
