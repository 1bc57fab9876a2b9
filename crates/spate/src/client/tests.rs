#![allow(clippy::unwrap_used)]
use std::sync::atomic::Ordering;

use super::test_server::{Reply, start};
use super::*;

const FIRST: &str = r#"data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}"#;
const SECOND: &str = r#"data: {"choices":[{"index":0,"delta":{"content":"é"}}],"usage":null}"#;

/// The texts of a stream and how it ended.
async fn follow(client: &Client) -> (String, Result<(), ClientError>) {
    let mut text = String::new();
    let outcome = async {
        let mut stream = client
            .stream("/v1/completions", Bytes::from_static(b"{}"))
            .await?;
        while let Some(event) = stream.next().await? {
            text += event.chunk.choices[0].text();
        }
        Ok(())
    };
    let outcome = outcome.await;
    (text, outcome)
}

async fn follow_once(reply: Reply) -> (String, Result<(), ClientError>) {
    let (url, _) = start(move |_| reply.clone()).await;
    follow(&Client::new(&url, None).unwrap()).await
}

#[test]
fn urls() {
    let parts = |url: &str| {
        let client = Client::new(url, None).unwrap();
        (client.authority, client.prefix)
    };
    let expect = |authority: &str, prefix: &str| (authority.to_owned(), prefix.to_owned());
    assert_eq!(
        parts("http://localhost:8000/v1/"),
        expect("localhost:8000", "")
    );
    assert_eq!(parts("http://host/api/v1"), expect("host:80", "/api"));
    assert_eq!(parts("http://[::1]:1"), expect("[::1]:1", ""));
    for url in [
        "host:80",
        "ftp://host",
        "http://",
        "",
        "http://u:p@host",
        "http://h/?q",
    ] {
        assert!(
            matches!(Client::new(url, None), Err(ClientError::Setup(_))),
            "{url}"
        );
    }
    let refused = Client::new("https://host", None).err().unwrap().to_string();
    assert!(refused.contains("proxy or tunnel"), "{refused}");
    assert!(Client::new("http://host", Some("a\nb")).is_err());
}

#[tokio::test]
async fn a_stream_is_read_to_its_end_and_its_connection_used_again() {
    let reply = Reply::sse(&[
        ": ping\n\n",
        &format!("{FIRST}\r\n\r\n{SECOND}\n"),
        "\ndata: [DO",
        "NE]\n\n",
    ]);
    let (url, seen) = start(move |request| {
        assert!(
            request
                .head
                .starts_with("post /v1/completions http/1.1\r\n")
        );
        assert!(request.head.contains("\r\nauthorization: bearer key\r\n"));
        assert_eq!(request.body, b"{}");
        reply.clone()
    })
    .await;
    let client = Client::new(&url, Some("key")).unwrap();
    for _ in 0..3 {
        let (text, outcome) = follow(&client).await;
        outcome.unwrap();
        assert_eq!(text, "aé");
    }
    assert_eq!(seen.requests.load(Ordering::SeqCst), 3);
    assert_eq!(seen.connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn receive_times_follow_the_server() {
    let mut reply = Reply::sse(&[
        &format!("{FIRST}\n\n"),
        &format!("{SECOND}\n\n"),
        "data: [DONE]\n\n",
    ]);
    reply.pause = Duration::from_millis(30);
    let (url, _) = start(move |_| reply.clone()).await;
    let client = Client::new(&url, None).unwrap();
    let mut stream = client
        .stream("/v1/completions", Bytes::new())
        .await
        .unwrap();
    let first = stream.next().await.unwrap().unwrap().at;
    let second = stream.next().await.unwrap().unwrap().at;
    assert!(
        second - first >= Duration::from_millis(25),
        "{:?}",
        second - first
    );
    assert!(stream.next().await.unwrap().is_none());
}

#[tokio::test]
async fn a_refusal_has_its_status_and_the_servers_words() {
    let body = r#"{"error":{"message":"queue is full","type":"rate_limit_error"}}"#;
    let (url, seen) = start(move |_| Reply::json("429 Too Many Requests", body)).await;
    let client = Client::new(&url, None).unwrap();
    for _ in 0..2 {
        let e = follow(&client).await.1.unwrap_err();
        assert_eq!(e.to_string(), "HTTP 429: queue is full");
        assert_eq!(e.kind(), "HTTP 429");
    }
    assert_eq!(seen.connections.load(Ordering::SeqCst), 1);

    let e = follow_once(Reply::json("502 Bad Gateway", "<html>"))
        .await
        .1;
    assert_eq!(e.unwrap_err().to_string(), "HTTP 502: Bad Gateway");
}

#[tokio::test]
async fn streams_that_go_wrong() {
    let first = format!("{FIRST}\n\n");
    let error = "data: {\"error\":{\"message\":\"out of luck\",\"code\":null}}\n\n";
    let (text, outcome) = follow_once(Reply::sse(&[&first, error])).await;
    assert_eq!(
        (text.as_str(), outcome.unwrap_err().to_string().as_str()),
        ("a", "the server gave up: out of luck")
    );

    let (text, outcome) = follow_once(Reply::sse(&[&first])).await;
    assert!(text == "a" && matches!(outcome, Err(ClientError::Unfinished)));

    let outcome = follow_once(Reply::sse(&["data: {\"choices\":[{\"text\":1}]}\n\n"]))
        .await
        .1;
    assert!(
        matches!(outcome, Err(ClientError::Malformed(_))),
        "{outcome:?}"
    );

    let outcome = follow_once(Reply::json("200 OK", "{}")).await.1;
    assert!(
        matches!(outcome, Err(ClientError::Malformed(_))),
        "{outcome:?}"
    );

    let mut broken = Reply::sse(&[&first, "data: [DONE]\n\n"]);
    broken.pieces.truncate(2);
    broken.close = true;
    let (text, outcome) = follow_once(broken).await;
    assert!(
        text == "a" && matches!(outcome, Err(ClientError::Broken(_))),
        "{outcome:?}"
    );
}

/// A request that may have been worked on is not sent twice behind the caller's back; one for which
/// the kept connection was closed beforehand is.
#[tokio::test]
async fn only_what_was_not_sent_is_sent_again() {
    let mut reply = Reply::json("200 OK", r#"{"data":[{"id":"m"}]}"#);
    reply.close = true;
    let (url, seen) = start(move |_| reply.clone()).await;
    let client = Client::new(&url, None).unwrap();
    for _ in 0..2 {
        assert_eq!(client.first_model().await.unwrap(), "m");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(seen.connections.load(Ordering::SeqCst), 2);

    let (url, seen) = start(|request| {
        let mut reply = Reply::json("200 OK", r#"{"data":[{"id":"m"}]}"#);
        if request.head.starts_with("post") {
            reply.pieces.clear();
            reply.close = true;
        }
        reply
    })
    .await;
    let client = Client::new(&url, None).unwrap();
    client.first_model().await.unwrap();
    assert!(matches!(
        follow(&client).await.1,
        Err(ClientError::Broken(_))
    ));
    assert_eq!(seen.requests.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn nobody_listens() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let e = Client::new(&url, None)
        .unwrap()
        .first_model()
        .await
        .unwrap_err();
    assert_eq!(e.kind(), "can't connect");
    assert!(e.to_string().contains("is the server running?"), "{e}");
}
