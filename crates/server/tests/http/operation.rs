//! Starting, draining, keys, metrics and logs.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use spate_executor::LocalKv;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::harness::{Options, only, post_to, start, start_default, token};

const COMPLETIONS: &str = "/v1/completions";

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn ask(tokens: u32) -> Value {
    json!({"prompt": "prompt", "max_tokens": tokens, "ignore_eos": true})
}

#[tokio::test]
async fn loading_is_told_from_ready() {
    let mut server = start(Options {
        ready: false,
        ..Options::default()
    })
    .await;
    server.app.set_loading("reading weights", 42.0);
    for path in ["/health", "/readyz", "/ping", "/health/ready"] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, 503, "{path}");
        assert_eq!(
            reply.json(),
            json!({"status": "loading", "stage": "reading weights", "percent": 42.0})
        );
    }
    for path in ["/livez", "/health/live"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    assert_eq!(server.get("/v1/models").await.json()["data"], json!([]));
    let early = server.post(COMPLETIONS, &ask(1)).await;
    assert_eq!(
        (early.status, &early.error()["code"]),
        (503, &json!("loading"))
    );
    assert!(early.headers.contains_key("retry-after"));
    assert_eq!(server.get("/metrics").await.status, 200);
    server.set_ready();
    assert_eq!(server.get("/health").await.json(), json!({"status": "ok"}));
    assert_eq!(server.post(COMPLETIONS, &ask(1)).await.status, 200);
}

#[tokio::test]
async fn o3_a_drain_lets_running_requests_finish() {
    let mut server = start(Options::default().step_time(millis(5))).await;
    let addr = server.addr;
    let running = tokio::spawn(async move {
        post_to(addr, COMPLETIONS, &serde_json::to_vec(&ask(100)).unwrap()).await
    });
    server.wait_metric("vllm:num_requests_running", 1.0).await;
    let mut idle = server.connect().await;
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    idle.readable().await.unwrap();
    let begun = Instant::now();
    server.begin_shutdown();
    let not_ready = loop {
        let reply = server.get("/readyz").await;
        if reply.status == 503 {
            break reply;
        }
    };
    assert!(begun.elapsed() < millis(100), "{:?}", begun.elapsed());
    assert_eq!(not_ready.json()["status"], "draining");
    assert_eq!(server.get("/livez").await.status, 200);
    let refused = server.post(COMPLETIONS, &ask(1)).await;
    assert_eq!(
        (refused.status, &refused.error()["code"]),
        (503, &json!("draining"))
    );
    assert!(refused.headers.contains_key("retry-after"));
    let reply = running.await.unwrap();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.json()["usage"]["completion_tokens"], 100);
    // The idle connection, which its client keeps open, does not hold the end up.
    timeout(millis(1000), &mut server.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn o3_a_drain_ends_when_its_time_is_over() {
    let options = Options::default()
        .step_time(millis(20))
        .server(|c| c.drain_timeout = millis(200));
    let mut server = start(options).await;
    let mut stream = server
        .open_stream(
            &json!({"prompt": "x", "max_tokens": 200, "ignore_eos": true, "stream": true}),
            2,
        )
        .await;
    let mut idle = server.connect().await;
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let begun = Instant::now();
    server.begin_shutdown();
    timeout(millis(2000), &mut server.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(begun.elapsed() >= millis(200));
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.ok();
    assert!(!rest.windows(6).any(|w| w == b"[DONE]"));
    // The engine is free of it.
    timeout(millis(1000), server.engine.idle()).await.unwrap();
}

#[tokio::test]
async fn o6_every_route_but_the_probes_asks_for_a_key() {
    let options = Options::default().server(|c| c.api_keys = vec!["one".into(), "two".into()]);
    let server = start(options).await;
    for path in [
        "/health",
        "/livez",
        "/readyz",
        "/ping",
        "/health/live",
        "/health/ready",
    ] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let body = serde_json::to_vec(&ask(1)).unwrap();
    for (method, path) in [
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("POST", "/v1/chat/completions"),
        ("POST", COMPLETIONS),
        ("POST", "/tokenize"),
        ("POST", "/v1/detokenize"),
        ("GET", "/not-there"),
    ] {
        for wrong in ["", "Bearer", "Bearer three", "Basic one", "one"] {
            let headers = [
                ("Authorization", wrong),
                ("Content-Type", "application/json"),
            ];
            let reply = server.request(method, path, &headers, &body).await;
            assert_eq!(reply.status, 401, "{path} {wrong:?}");
            assert_eq!(reply.error()["type"], "authentication_error");
            assert_eq!(reply.headers["www-authenticate"], "Bearer");
        }
    }
    for key in ["Bearer one", "bearer two"] {
        let headers = [("Authorization", key), ("Content-Type", "application/json")];
        assert_eq!(
            server
                .request("POST", COMPLETIONS, &headers, &body)
                .await
                .status,
            200
        );
    }
}

#[tokio::test]
async fn silence_on_a_stream_is_filled_with_pings() {
    let options = Options::default()
        .step_time(millis(200))
        .server(|c| c.ping_interval = millis(50));
    let server = start(options).await;
    let body = json!({"prompt": "x", "max_tokens": 3, "stream": true, "logit_bias": only('y')});
    let reply = server.post(COMPLETIONS, &body).await;
    assert!(reply.text().starts_with(": ping\n\n"), "{}", reply.text());
    assert!(reply.text().matches(": ping\n\n").count() >= 6);
    let events = reply.events();
    let text: String = events
        .iter()
        .map(|e| e["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, "yyy");
}

#[tokio::test]
async fn connections_are_kept_alive() {
    let server = start_default().await;
    let mut stream = server.connect().await;
    for _ in 0..3 {
        stream
            .write_all(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut part = [0; 4096];
        let len = timeout(millis(2000), stream.read(&mut part))
            .await
            .unwrap()
            .unwrap();
        assert!(part[..len].starts_with(b"HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let server = start_default().await;
    let before = server.metrics().await;
    assert_eq!(before["vllm:generation_tokens_total"], 0.0);
    let body = json!({"prompt": "p".repeat(40), "max_tokens": 10, "n": 2, "seed": 1, "ignore_eos": true, "logit_bias": only('x')});
    assert_eq!(server.post(COMPLETIONS, &body).await.status, 200);
    assert_eq!(server.post(COMPLETIONS, &body).await.status, 200);
    let stop = json!({"prompt": "s", "stop_token_ids": [token('x')], "logit_bias": only('x')});
    assert_eq!(server.post(COMPLETIONS, &stop).await.status, 200);
    server.wait_idle().await;
    let m = server.metrics().await;
    let count = |name: &str| m.get(name).copied().unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(count("vllm:prompt_tokens_total"), 81.0);
    assert_eq!(count("vllm:prompt_tokens_cached_total"), 32.0);
    assert_eq!(
        count("vllm:prompt_tokens_by_source_total{source=\"local_cache_hit\"}"),
        32.0
    );
    assert_eq!(
        count("vllm:prompt_tokens_by_source_total{source=\"local_compute\"}"),
        49.0
    );
    assert_eq!(
        count("vllm:prefix_cache_hits_total"),
        count("vllm:gpu_prefix_cache_hits_total")
    );
    assert!(count("vllm:prefix_cache_queries_total") >= count("vllm:prefix_cache_hits_total"));
    assert!(count("vllm:generation_tokens_total") >= 41.0);
    assert_eq!(
        count("vllm:request_success_total{finished_reason=\"length\"}"),
        4.0
    );
    assert_eq!(
        count("vllm:request_success_total{finished_reason=\"stop\"}"),
        1.0
    );
    for name in [
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
        "request_num_preemptions",
        "request_prefill_kv_computed_tokens",
    ] {
        assert_eq!(count(&format!("vllm:{name}_count")), 3.0, "{name}");
    }
    assert_eq!(count("vllm:request_params_n_sum"), 5.0);
    assert_eq!(count("vllm:request_params_max_tokens_sum"), 36.0);
    assert_eq!(count("vllm:request_prefill_kv_computed_tokens_sum"), 49.0);
    assert!(count("vllm:inter_token_latency_seconds_count") >= 36.0);
    assert!(count("vllm:request_time_per_output_token_seconds_count") >= 2.0);
    assert!(count("vllm:iteration_tokens_total_count") >= 10.0);
    assert!(count("spate_step_busy_seconds_count") >= 10.0);
    let text = server.get("/metrics").await.text();
    let info = text
        .lines()
        .find(|line| line.starts_with("vllm:cache_config_info{"))
        .unwrap();
    assert!(
        info.contains("block_size=\"16\"") && info.contains("num_gpu_blocks=\"128\""),
        "{info}"
    );
    let memory = text
        .lines()
        .find(|line| line.starts_with("spate_memory_bytes{"))
        .unwrap();
    assert!(
        memory.contains("device=\"sim\"")
            && memory.contains("part=\"weights\"")
            && memory.ends_with(" 42"),
        "{memory}"
    );
    assert!(text.contains("model_name=\"sim-model\"") && !text.contains("nowhere"));
}

#[tokio::test]
async fn the_cache_is_as_full_as_its_fuller_pool() {
    let mut options = Options::default().step_time(millis(20));
    options.sim.capacity.max_batch_tokens = 16;
    options.scheduler.max_batch_tokens = 16;
    options.sim.capacity.local = Some(LocalKv {
        window: 32,
        blocks: 8,
    });
    let server = start(options).await;
    let (addr, body) = (server.addr, ask(100).to_string());
    let request = tokio::spawn(async move { post_to(addr, COMPLETIONS, body.as_bytes()).await });
    // A block of 128, and of 8.
    server
        .wait_metric("vllm:kv_cache_usage_perc", 1.0 / 8.0)
        .await;
    let m = server.metrics().await;
    assert_eq!(m["spate_kv_pool_usage{pool=\"main\"}"], 1.0 / 128.0);
    assert_eq!(m["spate_kv_pool_usage{pool=\"local\"}"], 1.0 / 8.0);
    assert_eq!(request.await.unwrap().status, 200);
    server.wait_idle().await;
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    async fn access_line(&self, containing: &str) -> Value {
        for _ in 0..1000 {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            let line = text
                .lines()
                .find(|l| l.contains("spate::access") && l.contains(containing));
            if let Some(line) = line {
                return serde_json::from_str::<Value>(line).unwrap()["fields"].clone();
            }
            sleep(millis(10)).await;
        }
        panic!("no access line with {containing}");
    }
}

#[tokio::test]
async fn one_log_line_a_request() {
    // Of the whole process: the lines of other tests are there too.
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .json()
        .with_writer(move || writer.clone())
        .init();
    let server = start(Options::default().step_time(millis(2))).await;

    let reply = server.post(COMPLETIONS, &json!({"prompt": "prompt", "max_tokens": 5, "ignore_eos": true, "request_id": "whole"})).await;
    let line = log.access_line("whole").await;
    assert_eq!(line["route"], COMPLETIONS);
    assert_eq!(line["method"], "POST");
    assert_eq!(line["status"], 200);
    assert_eq!(line["id"], reply.json()["id"]);
    assert_eq!(line["prompt_tokens"], 6);
    assert_eq!(line["cached_tokens"], 0);
    assert_eq!(line["completion_tokens"], 5);
    assert_eq!(line["finish"], "length");
    let ms = |name: &str| line[name].as_f64().unwrap();
    assert!(
        ms("queue_ms") <= ms("ttft_ms") && ms("ttft_ms") < ms("total_ms"),
        "{line}"
    );

    let gone = json!({"prompt": "x", "max_tokens": 200, "ignore_eos": true, "stream": true, "request_id": "gone"});
    drop(server.open_stream(&gone, 2).await);
    let line = log.access_line("gone").await;
    assert_eq!(line["finish"], "abort");
    assert!(line["completion_tokens"].as_u64().unwrap() < 200);

    server
        .request(
            "GET",
            "/secret%0apath?key=secret",
            &[("X-Request-Id", "lost")],
            b"",
        )
        .await;
    let line = log.access_line("lost").await;
    assert_eq!(
        (&line["route"], &line["status"]),
        (&json!("unmatched"), &json!(404))
    );
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(
        !text.contains("secret") && !text.contains("\"prompt\""),
        "{text}"
    );
}
