//! Rows E of the table of faults: what happens to a request between admission and its end.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;
use tokio::time::sleep;

use crate::harness::{
    Options, Server, VOCAB, only, post_to, read_reply, start, start_default, token,
};

const COMPLETIONS: &str = "/v1/completions";

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A request that takes `tokens` steps.
fn long(tokens: u32) -> Value {
    json!({"prompt": "long", "max_tokens": tokens, "ignore_eos": true})
}

fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body
}

fn spawn_post(server: &Server, body: &Value) -> tokio::task::JoinHandle<crate::harness::Reply> {
    let (addr, body) = (server.addr, serde_json::to_vec(body).unwrap());
    tokio::spawn(async move { post_to(addr, COMPLETIONS, &body).await })
}

#[tokio::test]
async fn e1_more_kv_than_the_pool_has() {
    let mut options = Options::default();
    options.sim.capacity.blocks = 4; // 64 tokens of a context of 256
    let server = start(options).await;
    let reply = server.post(COMPLETIONS, &long(200)).await;
    assert_eq!(reply.status, 400);
    assert_eq!(reply.error()["code"], "context_length_exceeded");
    // A chat that names no limit gets what there is.
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "ignore_eos": true});
    let reply = server.post("/v1/chat/completions", &chat).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["usage"]["total_tokens"], 65);
    server.wait_idle().await;
}

#[tokio::test]
async fn e2_everyone_finishes_when_everyone_is_preempted() {
    let mut options = Options::default().step_time(millis(3));
    options.sim.capacity.blocks = 12;
    let server = start(options).await;
    let body = |i: u32| json!({"prompt": format!("{i} prompt"), "max_tokens": 100, "seed": i, "ignore_eos": true, "return_token_ids": true});
    let alone = server.post(COMPLETIONS, &body(3)).await.json();
    let crowd: Vec<_> = (0..8).map(|i| spawn_post(&server, &body(i))).collect();
    for (i, request) in crowd.into_iter().enumerate() {
        let reply = request.await.unwrap();
        assert_eq!(reply.status, 200);
        if i == 3 {
            assert_eq!(reply.json()["choices"], alone["choices"]);
        }
    }
    assert!(server.metric("vllm:num_preemptions_total").await > 0.0);
    server.wait_idle().await;
}

#[tokio::test]
async fn e3_a_full_queue() {
    let mut options = Options::default().step_time(millis(20));
    options.scheduler.max_num_seqs = 1;
    options.scheduler.max_waiting = 2;
    let server = start(options).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(spawn_post(&server, &long(200)));
    }
    server.wait_metric("vllm:num_requests_waiting", 2.0).await;
    // Counted before tokenizing: this prompt would be too long.
    let reply = server
        .post(COMPLETIONS, &json!({"prompt": "x".repeat(400)}))
        .await;
    assert_eq!(reply.status, 429);
    assert_eq!(reply.error()["type"], "rate_limit_error");
    assert!(reply.headers["retry-after"].parse::<u32>().unwrap() >= 1);
    assert_eq!(
        server.metrics().await["vllm:admission_rejections_total{reason=\"queue_full\"}"],
        1.0
    );
    assert_eq!(
        server.get("/health").await.status,
        200,
        "full is not unhealthy"
    );
    held.iter().for_each(|request| request.abort());
    server.wait_idle().await;
    assert_eq!(server.post(COMPLETIONS, &long(2)).await.status, 200);
    // What could never fit is the client's fault, not a matter of time.
    let reply = server
        .post(COMPLETIONS, &json!({"prompt": "x", "n": 4}))
        .await;
    assert_eq!((reply.status, &reply.error()["param"]), (400, &json!("n")));
}

#[tokio::test]
async fn e4_deadlines() {
    let options = Options::default()
        .step_time(millis(20))
        .server(|c| c.request_timeout = Some(millis(150)));
    let server = start(options).await;
    let reply = server.post(COMPLETIONS, &long(200)).await;
    assert_eq!(
        (reply.status, &reply.error()["code"]),
        (504, &json!("timeout"))
    );
    assert_eq!(server.post(COMPLETIONS, &long(3)).await.status, 200);
    // After the first token the status has gone out: an event says it, and no [DONE] follows.
    let reply = server.post(COMPLETIONS, &streamed(long(200))).await;
    assert_eq!(reply.status, 200);
    let (events, done) = reply.events_so_far();
    assert!(!done);
    assert_eq!(events.last().unwrap()["error"]["code"], "timeout");
    assert!(events.len() > 2);
    server.wait_idle().await;
}

#[tokio::test]
async fn e4_a_deadline_in_the_queue() {
    let mut options = Options::default()
        .step_time(millis(300))
        .server(|c| c.request_timeout = Some(millis(150)));
    options.scheduler.max_num_seqs = 1;
    options.sim.capacity.depth = 1;
    let server = start(options).await;
    let first = spawn_post(&server, &long(9));
    server.wait_metric("vllm:num_requests_running", 0.0).await;
    sleep(millis(50)).await;
    let second = server.post(COMPLETIONS, &streamed(long(9))).await;
    assert_eq!(
        (second.status, &second.error()["code"]),
        (503, &json!("queue_timeout"))
    );
    assert!(second.headers.contains_key("retry-after"));
    assert_eq!(first.await.unwrap().status, 504);
    server.wait_idle().await;
}

#[tokio::test]
async fn e5_a_client_that_leaves_frees_its_blocks() {
    let mut options = Options::default().step_time(millis(20));
    options.scheduler.max_num_seqs = 2;
    let server = start(options).await;
    let canary = server.canary().await;
    let stays = server.open_stream(&streamed(long(200)), 3).await;
    let leaves = server.open_stream(&streamed(long(200)), 3).await;
    let queued = spawn_post(&server, &long(200));
    server.wait_metric("vllm:num_requests_waiting", 1.0).await;
    drop(leaves);
    queued.abort();
    server.wait_metric("vllm:num_requests_running", 1.0).await;
    server.wait_metric("vllm:num_requests_waiting", 0.0).await;
    // Someone who waits for a whole response leaves too.
    let whole = spawn_post(&server, &long(200));
    server.wait_metric("vllm:num_requests_running", 2.0).await;
    whole.abort();
    server.wait_metric("vllm:num_requests_running", 1.0).await;
    drop(stays);
    server.wait_idle().await;
    let aborted = "vllm:request_success_total{finished_reason=\"abort\"}";
    assert_eq!(server.metrics().await[aborted], 4.0);
    assert_eq!(server.canary().await, canary);
}

#[tokio::test]
async fn e6_a_client_that_does_not_read_is_cut_off() {
    let options = Options::default().server(|c| c.write_timeout = millis(300));
    let server = start(options).await;
    let canary = server.canary().await;
    // Some thirty megabytes, more than the sockets of both ends buffer.
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "n": 64, "max_tokens": 200, "logprobs": true,
        "top_logprobs": 20, "ignore_eos": true, "stream": true,
    });
    let body = serde_json::to_vec(&body).unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.addr).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream
        .write_all(&[head.as_bytes(), &body].concat())
        .await
        .unwrap();
    // Nobody waits for it meanwhile.
    assert_eq!(server.canary().await, canary);
    server.wait_idle().await;
    sleep(millis(600)).await;
    let reply = read_reply(&mut stream).await;
    let (_, done) = Reply::cut(&reply.body);
    assert!(!done, "all of it was kept for a client that did not read");
    assert_eq!(server.canary().await, canary);
}

/// Whether a body that broke off anywhere holds the end of the stream.
struct Reply;

impl Reply {
    fn cut(body: &[u8]) -> (usize, bool) {
        let done = body.windows(12).any(|w| w == b"data: [DONE]");
        (body.len(), done)
    }
}

#[tokio::test]
async fn e7_a_slot_keeps_nothing_of_its_last_sequence() {
    let mut options = Options::default();
    options.sim.capacity.slots = 1;
    let server = start(options).await;
    let canary = server.canary().await;
    for odd in [
        json!({"logit_bias": only('z')}),
        json!({"seed": 99, "temperature": 2}),
        json!({"repetition_penalty": 2, "frequency_penalty": 2}),
        json!({"min_tokens": 5, "stop_token_ids": (0..VOCAB).collect::<Vec<_>>()}),
        json!({"stop": "a", "logprobs": 5}),
        json!({"max_tokens": 200, "cache_salt": "x"}),
    ] {
        let mut body = json!({"prompt": "canary", "max_tokens": 9});
        body.as_object_mut()
            .unwrap()
            .extend(odd.as_object().unwrap().clone());
        assert_eq!(server.post(COMPLETIONS, &body).await.status, 200, "{odd}");
        assert_eq!(server.canary().await, canary, "{odd}");
    }
}

#[tokio::test]
async fn e8_salts_do_not_share_cached_blocks() {
    let server = start_default().await;
    let cached = async |salt: Value| {
        let body = json!({"prompt": "s".repeat(64), "max_tokens": 4, "cache_salt": salt, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
        let reply = server.post(COMPLETIONS, &body).await.json();
        let hits = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap();
        (hits > 0, reply["choices"][0]["token_ids"].clone())
    };
    let (hit, tokens) = cached("a".into()).await;
    assert!(!hit);
    for (salt, expected) in [
        (json!("a"), true),
        (json!("b"), false),
        (Value::Null, false),
        (json!("b"), true),
        (Value::Null, true),
    ] {
        assert_eq!(
            cached(salt.clone()).await,
            (expected, tokens.clone()),
            "{salt}"
        );
    }
}

#[tokio::test]
async fn e10_a_lost_device_turns_everything_red() {
    let mut options = Options::default();
    options.sim.fatal_after = Some(5);
    let server = start(options).await;
    let reply = server.post(COMPLETIONS, &long(100)).await;
    assert_eq!(
        (reply.status, &reply.error()["type"]),
        (503, &json!("server_error"))
    );
    for path in ["/health", "/readyz", "/livez"] {
        let reply = server.get(path).await;
        assert_eq!(
            (reply.status, &reply.json()["status"]),
            (503, &json!("dead")),
            "{path}"
        );
    }
    assert_eq!(server.post(COMPLETIONS, &long(1)).await.status, 503);
}

#[tokio::test]
async fn e10_a_hung_step_turns_everything_red() {
    // Late enough for both requests to be running.
    let mut hung = Options::default().step_time(millis(20));
    hung.sim.hang_after = Some(25);
    // A call into the driver that never returns: the engine thread can't say so itself.
    let mut stuck = Options::default().step_time(millis(20));
    stuck.sim.stuck_after = Some(25);
    for options in [hung, stuck] {
        let server = start(options).await;
        let streaming = spawn_post(&server, &streamed(long(100)));
        let whole = spawn_post(&server, &long(100));
        let started = Instant::now();
        while server.get("/livez").await.status == 200 {
            assert!(started.elapsed() < millis(3000), "hung, and nobody says so");
            sleep(millis(10)).await;
        }
        let (events, done) = streaming.await.unwrap().events_so_far();
        assert!(!done);
        assert_eq!(events.last().unwrap()["error"]["type"], "server_error");
        assert_eq!(whole.await.unwrap().status, 503);
        assert_eq!(server.get("/health").await.status, 503);
    }
}

#[tokio::test]
async fn e11_a_failed_row_fails_alone() {
    let mut options = Options::default();
    options.sim.fail_token = Some(token('!'));
    let server = start(options).await;
    let canary = server.canary().await;
    let good = spawn_post(
        &server,
        &json!({"prompt": "good", "max_tokens": 50, "ignore_eos": true, "logit_bias": only('x')}),
    );
    let bad = server.post(COMPLETIONS, &json!({"prompt": "bad!"})).await;
    assert_eq!(
        (bad.status, &bad.error()["type"]),
        (500, &json!("server_error"))
    );
    assert_eq!(good.await.unwrap().status, 200);
    server.wait_idle().await;
    assert_eq!(server.canary().await, canary);
}
