//! Rows H of the table of faults: bad HTTP. After each one a canary request gets its usual answer.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::harness::{Options, Server, read_reply, start, start_default};

const COMPLETIONS: &str = "/v1/completions";

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A server after a canary, to compare with [`still_sings`].
async fn with_canary(options: Options) -> (Server, Vec<u64>) {
    let server = start(options).await;
    let canary = server.canary().await;
    (server, canary)
}

async fn still_sings(server: &Server, canary: &[u64]) {
    server.wait_idle().await;
    assert_eq!(server.canary().await, canary);
}

#[tokio::test]
async fn h1_slow_headers() {
    let options = Options::default().server(|c| c.header_timeout = millis(300));
    let (server, canary) = with_canary(options).await;
    let started = Instant::now();
    let mut slow = Vec::new();
    for i in 0..300 {
        let mut stream = server.connect().await;
        let begun: &[u8] = match i % 3 {
            0 => b"",
            1 => b"GET /health HT",
            _ => b"GET /health HTTP/1.1\r\nHost: x\r\nX-",
        };
        stream.write_all(begun).await.unwrap();
        slow.push(stream);
    }
    still_sings(&server, &canary).await;
    for mut stream in slow {
        // Another byte now and then gives no more time.
        stream.write_all(b"a").await.ok();
        let mut rest = Vec::new();
        timeout(millis(3000), stream.read_to_end(&mut rest))
            .await
            .expect("still open")
            .ok();
    }
    assert!(started.elapsed() < millis(4000), "{:?}", started.elapsed());
    still_sings(&server, &canary).await;
}

#[tokio::test]
async fn h2_slow_body() {
    let options = Options::default().server(|c| c.body_timeout = millis(200));
    let (server, canary) = with_canary(options).await;
    let mut stream = server.connect().await;
    stream
        .write_all(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
              Content-Length: 100\r\n\r\n{\"prompt\":",
        )
        .await
        .unwrap();
    let reply = read_reply(&mut stream).await;
    assert_eq!(reply.status, 408);
    reply.error();
    still_sings(&server, &canary).await;
}

#[tokio::test]
async fn h3_too_many_or_too_large_headers() {
    let (server, canary) = with_canary(Options::default()).await;
    let many = |n: usize| (0..n).map(|i| format!("X-{i}: v\r\n")).collect::<String>();
    let get = |headers: String| {
        format!("GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n")
    };
    assert_eq!(server.raw(get(many(98)).as_bytes()).await.status, 200);
    for headers in [
        many(99),
        many(150),
        format!("X: {}\r\n", "v".repeat(65 << 10)),
    ] {
        let reply = server.raw(get(headers).as_bytes()).await;
        assert_eq!(reply.status, 431);
        reply.error();
    }
    // What is larger still, hyper refuses while reading: the same status, without a body.
    for headers in [many(5000), format!("X: {}\r\n", "v".repeat(1 << 20))] {
        assert_eq!(server.raw(get(headers).as_bytes()).await.status, 431);
    }
    assert_eq!(
        server.get(&format!("/{}", "x".repeat(70_000))).await.status,
        414
    );
    still_sings(&server, &canary).await;
}

#[tokio::test]
async fn h4_body_over_the_limit() {
    let options = Options::default().server(|c| c.max_body_bytes = 64 << 10);
    let (server, canary) = with_canary(options).await;
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    // Declared: refused before any of it comes.
    let declared = format!("{head}Content-Length: 10000000000\r\n\r\n");
    let reply = server.raw(declared.as_bytes()).await;
    assert_eq!(reply.status, 413);
    reply.error();
    // In chunks that never end.
    let mut stream = server.connect().await;
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
    stream.write_all(chunked.as_bytes()).await.unwrap();
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(4096));
    let mut sent = 0;
    while stream.write_all(chunk.as_bytes()).await.is_ok() {
        sent += 4096;
        assert!(sent < 1 << 30, "the server swallows everything");
        if timeout(Duration::ZERO, stream.readable()).await.is_ok() {
            break;
        }
    }
    assert_eq!(read_reply(&mut stream).await.status, 413);
    // A client that sends all of a body somewhat over the limit gets to read the answer.
    let reply = server.post_raw(COMPLETIONS, &b" ".repeat(100 << 10)).await;
    assert_eq!(reply.status, 413);
    // The limit itself passes.
    let mut body = br#"{"prompt": "x", "max_tokens": 1}"#.to_vec();
    body.resize(64 << 10, b' ');
    assert_eq!(server.post_raw(COMPLETIONS, &body).await.status, 200);
    body.push(b' ');
    assert_eq!(server.post_raw(COMPLETIONS, &body).await.status, 413);
    still_sings(&server, &canary).await;
}

#[tokio::test]
async fn h5_h6_h7_bad_json() {
    let (server, canary) = with_canary(Options::default()).await;
    let deep = [b"{\"prompt\":".as_slice(), &b"[".repeat(100_000)].concat();
    let closed = [deep.clone(), b"]".repeat(100_000), b"}".to_vec()].concat();
    for body in [
        deep,
        closed,
        b"{\"prompt\": \"\xff\"}".to_vec(),
        br#"{"prompt": "\ud800"}"#.to_vec(),
        br#"{"prompt": "a", "prompt": "b"}"#.to_vec(),
        br#"{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}"#.to_vec(),
        b"".to_vec(),
        b"[]".to_vec(),
        b"{".to_vec(),
    ] {
        let reply = server.post_raw(COMPLETIONS, &body).await;
        assert_eq!(reply.status, 400);
        assert_eq!(reply.error()["type"], "invalid_request_error");
    }
    still_sings(&server, &canary).await;
}

#[tokio::test]
async fn h8_h9_wrong_content_type_or_encoding() {
    let server = start_default().await;
    let body = br#"{"prompt": "x", "max_tokens": 1}"#;
    let ask = async |headers: &[(&str, &str)]| {
        let reply = server.request("POST", COMPLETIONS, headers, body).await;
        if reply.status != 200 {
            reply.error();
        }
        reply.status
    };
    let kind = |kind| ("Content-Type", kind);
    assert_eq!(ask(&[kind("application/json")]).await, 200);
    assert_eq!(ask(&[kind("Application/JSON; charset=utf-8")]).await, 200);
    assert_eq!(ask(&[]).await, 415);
    for wrong in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "json",
        "",
    ] {
        assert_eq!(ask(&[kind(wrong)]).await, 415, "{wrong}");
    }
    for coding in ["gzip", "br", "deflate", "gzip, identity"] {
        let headers = [kind("application/json"), ("Content-Encoding", coding)];
        assert_eq!(ask(&headers).await, 415, "{coding}");
    }
}

#[tokio::test]
async fn h10_ambiguous_framing() {
    let (server, canary) = with_canary(Options::default()).await;
    let two_lengths =
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
        Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}    ";
    assert_eq!(server.raw(two_lengths).await.status, 400);
    for lengths in ["+5", "5, 6", "0x5", "-1"] {
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {lengths}\r\n\r\n{{}}"
        );
        assert_eq!(
            server.raw(request.as_bytes()).await.status,
            400,
            "{lengths}"
        );
    }
    // Length and chunks together: one request at most is read from such a connection, so that
    // nothing can be smuggled in as a second one.
    for (first, second) in [
        ("Content-Length: 4", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 4"),
    ] {
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{first}\r\n\
             {second}\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n"
        );
        let reply = server.raw(request.as_bytes()).await;
        assert_eq!(reply.status, 400);
        assert!(!String::from_utf8_lossy(&reply.body).contains("HTTP/1.1"));
    }
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
    ] {
        assert!([0, 400].contains(&server.raw(garbage).await.status));
    }
    still_sings(&server, &canary).await;
}

#[tokio::test]
async fn h11_odd_methods_and_paths_never_pass_the_key() {
    let options = Options::default().server(|c| c.api_keys = vec!["secret".into()]);
    let server = start(options).await;
    let key = [("Authorization", "Bearer secret")];
    for path in [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/./models",
        "/health/../v1/models",
        "/%76%31/models",
        "/v1%2fmodels",
        "/health%2f..%2fv1/models",
        "//health",
        "/HEALTH",
        "/health/",
        "/metrics",
        "/version",
        "/v1/models",
        "/nowhere",
        "/",
        "*",
    ] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, 401, "{path}");
        assert_eq!(reply.error()["type"], "authentication_error");
        let reply = server.request("GET", path, &key, b"").await;
        let expected = match path {
            "/metrics" | "/version" | "/v1/models" => 200,
            _ => 404,
        };
        assert_eq!(reply.status, expected, "{path} with a key");
    }
    // Absolute form, with whatever host.
    for target in [
        "http://test/v1/models",
        "http://evil/v1/models",
        "http://health/v1/models",
    ] {
        assert_eq!(server.get(target).await.status, 401, "{target}");
        assert_eq!(server.request("GET", target, &key, b"").await.status, 200);
    }
    assert_eq!(server.get("http://evil/health").await.status, 200);
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "post"] {
        let reply = server.request(method, "/v1/completions", &[], b"").await;
        assert_eq!(reply.status, 401, "{method}");
        let reply = server.request(method, "/v1/completions", &key, b"").await;
        assert_eq!(reply.status, 405, "{method}");
        reply.error();
    }
    // Methods that probes do not use change nothing on their paths either.
    assert_eq!(
        server.request("POST", "/health", &[], b"").await.status,
        405
    );
}

#[tokio::test]
async fn h13_no_cors_headers() {
    let server = start_default().await;
    let headers = [
        ("Origin", "http://evil"),
        ("Access-Control-Request-Method", "POST"),
    ];
    for method in ["GET", "OPTIONS"] {
        let reply = server.request(method, "/v1/models", &headers, b"").await;
        assert!(
            reply
                .headers
                .keys()
                .all(|name| !name.starts_with("access-control"))
        );
    }
}

#[tokio::test]
async fn h14_a_flood_of_connections_waits_its_turn() {
    let options = Options::default().server(|c| {
        c.max_connections = 8;
        c.header_timeout = millis(3000);
    });
    let (server, canary) = with_canary(options).await;
    let mut flood = Vec::new();
    for _ in 0..8 {
        flood.push(server.connect().await);
    }
    sleep(millis(50)).await;
    let mut waiting = server.connect().await;
    waiting
        .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut part = [0; 1];
    let early = timeout(millis(100), waiting.read(&mut part)).await;
    assert!(early.is_err(), "more connections are served than may be");
    drop(flood.pop());
    assert!(timeout(millis(2000), waiting.readable()).await.is_ok());
    still_sings(&server, &canary).await;
}
