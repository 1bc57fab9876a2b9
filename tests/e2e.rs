//! The real binary with the real model: what a person or a supervisor would see.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Daemon, SPATE, Scratch, free_port, model, read_answer, request, wait_for};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

fn completion(prompt: &str, max_tokens: u32) -> Value {
    json!({"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

fn streamed(prompt: &str, max_tokens: u32) -> Value {
    let mut body = completion(prompt, max_tokens);
    body["stream"] = true.into();
    body
}

fn text_of(answer: &Value) -> String {
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn a_stream_is_the_whole_answer_in_pieces() {
    let daemon = Daemon::start(&[]);
    let mut body = json!({
        "model": "m",
        "messages": [
            {"role": "system", "content": "You are a terse assistant."},
            {"role": "user", "content": "Name three primary colours."},
        ],
        "max_tokens": 24,
        "temperature": 0,
    });
    let whole = daemon.post("/v1/chat/completions", &body);
    assert_eq!(whole.status, 200, "{}", whole.text);
    let whole = whole.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.contains("Red"), "{text}");

    body["stream"] = true.into();
    let stream = daemon.post("/v1/chat/completions", &body);
    let (last, chunks) = stream
        .events()
        .split_last()
        .map(|(last, rest)| (*last, rest.to_vec()))
        .unwrap();
    assert_eq!(last, "[DONE]");
    let pieces: String = chunks
        .iter()
        .map(|chunk| serde_json::from_str::<Value>(chunk).unwrap())
        .filter_map(|chunk| {
            chunk["choices"][0]["delta"]["content"]
                .as_str()
                .map(str::to_owned)
        })
        .collect();
    assert_eq!(pieces, text);
}

#[test]
fn many_at_once_get_the_answers_they_would_get_alone() {
    let daemon = Daemon::start(&[]);
    let prompts: Vec<String> = (0..6)
        .map(|i| format!("The number {i} is known for"))
        .collect();
    let ask = |prompt: &String| {
        text_of(
            &daemon
                .post("/v1/completions", &completion(prompt, 16))
                .json(),
        )
    };
    let alone: Vec<String> = prompts.iter().map(ask).collect();
    let together: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = prompts
            .iter()
            .map(|prompt| scope.spawn(move || ask(prompt)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(alone, together);
    assert_eq!(daemon.metric("vllm:num_requests_running"), 0.0);
}

#[test]
fn a_shared_beginning_is_computed_once_and_billed_as_cached() {
    let daemon = Daemon::start(&[]);
    let prefix =
        "All happy families are alike; each unhappy family is unhappy in its own way. ".repeat(4);
    let first = daemon
        .post("/v1/completions", &completion(&format!("{prefix}One"), 4))
        .json();
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let before = daemon.metric("vllm:prefix_cache_hits_total");
    let second = daemon
        .post("/v1/completions", &completion(&format!("{prefix}Two"), 4))
        .json();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    let prompt = second["usage"]["prompt_tokens"].as_u64().unwrap();
    // All but the last, partly filled block.
    assert!(
        cached >= 48 && cached.is_multiple_of(16) && cached < prompt,
        "{second}"
    );
    assert_eq!(
        daemon.metric("vllm:prefix_cache_hits_total") - before,
        cached as f64
    );
}

#[test]
fn sigterm_lets_running_requests_finish() {
    let mut daemon = Daemon::start(&[]);
    let mut stream = daemon.open_stream(&streamed("Once upon a time", 150));
    let running = || (daemon.metric("vllm:num_requests_running") == 1.0).then_some(());
    wait_for("the request to run", LIMIT, running);
    daemon.signal("-TERM");
    let unready =
        || request(daemon.port, "GET", "/readyz", &[], "").filter(|answer| answer.status == 503);
    wait_for("readiness to end", Duration::from_secs(2), unready);
    let refused = daemon.post("/v1/completions", &completion("x", 1));
    assert_eq!(refused.status, 503, "{}", refused.text);

    let answer = read_answer(&mut stream).unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.events().last(), Some(&"[DONE]"));
    drop(stream);
    assert_eq!(daemon.wait(LIMIT).code(), Some(0));
}

#[test]
fn a_second_signal_ends_it_now() {
    let mut daemon = Daemon::start(&[]);
    let _stream = daemon.open_stream(&streamed("Once upon a time", 2000));
    let running = || (daemon.metric("vllm:num_requests_running") == 1.0).then_some(());
    wait_for("the request to run", LIMIT, running);
    daemon.signal("-TERM");
    let unready =
        || request(daemon.port, "GET", "/readyz", &[], "").filter(|answer| answer.status == 503);
    wait_for("readiness to end", Duration::from_secs(2), unready);
    daemon.signal("-TERM");
    assert_eq!(daemon.wait(Duration::from_secs(5)).code(), Some(143));
}

#[test]
fn a_port_in_use_is_found_before_anything_is_loaded() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    // The model does not exist: reaching for it would give another error.
    let output = Command::new(SPATE)
        .args(["serve", "/does/not/exist.gguf", "--port", &port])
        .output()
        .unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        complaint.contains(&format!("can't listen on 127.0.0.1:{port}")),
        "{complaint}"
    );
}

#[test]
fn a_mistyped_setting_ends_the_start_with_a_hint() {
    let scratch = Scratch::new();
    let file = scratch.write("spate.toml", b"max_num_seq = 4\n");
    let output = Command::new(SPATE)
        .args(["serve", "--config"])
        .arg(file)
        .output()
        .unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        complaint.contains("did you mean 'max_num_seqs'?"),
        "{complaint}"
    );
}

#[test]
fn a_killed_daemon_starts_again_on_the_same_port() {
    let mut daemon = Daemon::start(&[]);
    let _stream = daemon.open_stream(&streamed("Once upon a time", 2000));
    let running = || (daemon.metric("vllm:num_requests_running") == 1.0).then_some(());
    wait_for("the request to run", LIMIT, running);
    daemon.signal("-KILL");
    daemon.wait(LIMIT);
    let again = Daemon::start_on(daemon.port, &[]);
    assert_eq!(again.port, daemon.port);
    assert_eq!(
        again.post("/v1/completions", &completion("Hi", 2)).status,
        200
    );
}

#[test]
fn an_idle_daemon_uses_no_cpu() {
    let daemon = Daemon::start(&[]);
    assert_eq!(
        daemon.post("/v1/completions", &completion("Hi", 8)).status,
        200
    );
    std::thread::sleep(Duration::from_millis(200));
    let before = daemon.cpu_ticks();
    std::thread::sleep(Duration::from_secs(2));
    let used = daemon.cpu_ticks() - before;
    assert!(used <= 4, "{used} hundredths of a second in two seconds");
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let daemon = Daemon::start(&["--enable-prefix-caching", "false"]);
    let mut stream = daemon.open_stream(&streamed("Once upon a time", 2000));
    let mut first = String::new();
    while !first.starts_with("data: ") {
        first.clear();
        assert!(
            stream.read_line(&mut first).unwrap() > 0,
            "the stream ended"
        );
    }
    assert!(daemon.metric("vllm:kv_cache_usage_perc") > 0.0);
    drop(stream);
    let freed = || {
        let idle = daemon.metric("vllm:num_requests_running") == 0.0;
        (idle && daemon.metric("vllm:kv_cache_usage_perc") == 0.0).then_some(())
    };
    wait_for("the blocks to come back", Duration::from_secs(5), freed);
}

#[test]
fn memory_beyond_weights_and_kv_cache_stays_below_100_mb() {
    let daemon = Daemon::start(&[]);
    let prompt = "word ".repeat(1500);
    std::thread::scope(|scope| {
        for i in 0..4 {
            let (daemon, prompt) = (&daemon, &prompt);
            scope.spawn(move || {
                let body = completion(&format!("{i} {prompt}"), 8);
                assert_eq!(daemon.post("/v1/completions", &body).status, 200);
            });
        }
    });
    let budget = |part: &str| -> u64 {
        let line = daemon
            .banner
            .iter()
            .find(|line| line.contains(part))
            .unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words.last(), Some(&"MiB"));
        (words[words.len() - 2].parse::<f64>().unwrap() * 1048576.0) as u64
    };
    let resident = daemon.memory("VmRSS");
    let beyond = resident.saturating_sub(budget("weights") + budget("KV cache"));
    println!(
        "resident {} MB, of which beyond weights and KV cache {} MB",
        resident / 1_000_000,
        beyond / 1_000_000
    );
    assert!(beyond <= 100_000_000, "{beyond} bytes");
}

/// A model source that never answers, made of a `python3` that only sleeps, holds the start in its
/// first stage.
#[test]
fn probes_are_answered_while_loading_and_sigterm_still_ends_it() {
    let scratch = Scratch::new();
    let python = scratch.write("bin/python3", b"#!/bin/sh\nexec sleep 30\n");
    Command::new("chmod")
        .arg("+x")
        .arg(&python)
        .status()
        .unwrap();
    let port = free_port();
    let mut child = Command::new(SPATE)
        .args(["serve", "pip:nothing==1", "--port", &port.to_string()])
        .env(
            "PATH",
            format!("{}:/usr/bin:/bin", python.parent().unwrap().display()),
        )
        .env("XDG_CACHE_HOME", scratch.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ready = || request(port, "GET", "/readyz", &[], "");
    let unready = wait_for("an answer", LIMIT, || {
        ready().filter(|a| a.text.contains("pip"))
    });
    assert_eq!(unready.status, 503);
    assert_eq!(unready.json()["status"], "loading", "{}", unready.text);
    assert_eq!(request(port, "GET", "/livez", &[], "").unwrap().status, 200);
    let refused = request(port, "GET", "/v1/models", &[], "").unwrap();
    assert!(
        !refused.text.contains("nothing"),
        "hidden until it is there: {}",
        refused.text
    );

    Command::new("kill")
        .arg(child.id().to_string())
        .status()
        .unwrap();
    let status = wait_for("the end", Duration::from_secs(5), || {
        child.try_wait().unwrap()
    });
    assert_eq!(status.code(), Some(0));
}

#[test]
fn without_its_key_the_api_is_closed() {
    let daemon = Daemon::start(&["--api-key", "sk-right"]);
    assert_eq!(daemon.get("/v1/models").status, 401);
    assert_eq!(daemon.get("/livez").status, 200);
    let headers = [("Authorization", "Bearer sk-right")];
    assert_eq!(
        request(daemon.port, "GET", "/v1/models", &headers, "")
            .unwrap()
            .status,
        200
    );
    assert!(!daemon.banner.join("\n").contains("sk-right"));
}

#[test]
fn bench_counts_what_it_asked_for() {
    let daemon = Daemon::start(&[]);
    let scratch = Scratch::new();
    let json = scratch.path().join("result.json");
    for load in [["--concurrency", "3"], ["--rate", "20"]] {
        let output = Command::new(SPATE)
            .args([
                "bench",
                "--url",
                &daemon.url(),
                "--requests",
                "6",
                "--prompt-len",
                "64",
            ])
            .args([
                "--output-len",
                "8",
                "--shared-prefix",
                "50%",
                "--warmup",
                "1",
                "--json",
            ])
            .arg(&json)
            .args(load)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let table = String::from_utf8(output.stdout).unwrap();
        for row in ["throughput", "TTFT", "TPOT", "ITL", "p50", "p90", "p99"] {
            assert!(table.contains(row), "{table}");
        }
        let document: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        let result = &document["result"];
        assert_eq!(result["completed"], 6);
        assert_eq!(
            (&result["errors"], &result["unfinished"]),
            (&json!({}), &json!(0))
        );
        assert_eq!(result["prompt_tokens"], 6 * 64);
        assert_eq!(result["output_tokens"], 6 * 8);
        // The warm-up brought the shared 32 tokens into the cache.
        assert!(
            result["cached_tokens"].as_u64().unwrap() >= 6 * 32,
            "{result}"
        );
        let (ttft, e2e) = (
            result["ttft_ms"]["p50"].as_f64(),
            result["e2e_ms"]["p50"].as_f64(),
        );
        assert!(ttft.unwrap() > 0.0 && ttft < e2e);
    }
}

#[test]
fn bench_fails_when_nothing_answers() {
    let url = format!("http://127.0.0.1:{}", free_port());
    let output = Command::new(SPATE)
        .args(["bench", "--url", &url, "--model", "m", "--requests", "2"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("0 completed, 2 failed"), "{table}");
}

#[test]
fn a_conversation_in_the_terminal() {
    let mut child = Command::new(SPATE)
        .args([
            "chat",
            model().to_str().unwrap(),
            "--temperature",
            "0",
            "--max-tokens",
            "24",
        ])
        .args([
            "--kv-cache-memory",
            "64MiB",
            "--system",
            "You are a terse assistant.",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let mut input = child.stdin.take().unwrap();
    input
        .write_all(b"Name three primary colours.\n/reset\n/exit\n")
        .unwrap();
    let mut output = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert!(output.contains("Red"), "{output}");
    assert!(started.elapsed() < LIMIT);
}
