#![allow(clippy::unwrap_used)]
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::client::test_server::{Reply, start};

/// Answers "one", "two", …; an error where the last message says so.
async fn server() -> (String, Arc<Mutex<Vec<Value>>>) {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let log = requests.clone();
    let (url, _) = start(move |request| {
        let request: Value = serde_json::from_slice(&request.body).unwrap();
        let mut log = log.lock().unwrap();
        log.push(request["messages"].clone());
        if request["messages"].as_array().unwrap().last().unwrap()["content"] == "fail" {
            return Reply::json("400 Bad Request", r#"{"error":{"message":"too long"}}"#);
        }
        let chunk = |text: &str| {
            let chunk = json!({"choices": [{"index": 0, "delta": {"content": text}}]});
            format!("data: {chunk}\n\n")
        };
        let text = ["one", "two", "three"][log.len() - 1];
        Reply::sse(&[
            &chunk(""),
            &chunk(&text[..1]),
            &chunk(&text[1..]),
            "data: [DONE]\n\n",
        ])
    })
    .await;
    (url, requests)
}

async fn talk(url: &str, is_interactive: bool, lines: &[&str]) -> Result<()> {
    let mut chat = Chat {
        client: Client::new(url, None).unwrap(),
        conversation: Conversation {
            model: "m".into(),
            system: None,
            messages: Vec::new(),
        },
        max_tokens: 10,
        temperature: None,
        is_interactive,
    };
    let (sender, receiver) = mpsc::channel(lines.len());
    for line in lines {
        sender.send((*line).to_owned()).await.unwrap();
    }
    drop(sender);
    chat.run(receiver).await
}

fn messages(turns: &[(&str, &str)]) -> Value {
    let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    turns.iter().map(message).collect()
}

#[tokio::test]
async fn the_server_is_told_the_whole_conversation() {
    let (url, requests) = server().await;
    let lines = [
        "a",
        "/system brief",
        "b\\",
        "c",
        "/reset",
        "d",
        "/exit",
        "never sent",
    ];
    talk(&url, false, &lines).await.unwrap();
    let expected = [
        messages(&[("user", "a")]),
        messages(&[
            ("system", "brief"),
            ("user", "a"),
            ("assistant", "one"),
            ("user", "b\nc"),
        ]),
        messages(&[("system", "brief"), ("user", "d")]),
    ];
    assert_eq!(*requests.lock().unwrap(), expected);
}

#[tokio::test]
async fn a_failed_turn_is_forgotten_in_a_terminal_and_the_end_of_a_script() {
    let (url, requests) = server().await;
    talk(&url, true, &["fail", "b"]).await.unwrap();
    assert_eq!(requests.lock().unwrap()[1], messages(&[("user", "b")]));

    let (url, requests) = server().await;
    let e = talk(&url, false, &["fail", "b"]).await.unwrap_err();
    assert_eq!(e.to_string(), "HTTP 400: too long");
    assert_eq!(requests.lock().unwrap().len(), 1);
}

#[test]
fn figures_of_an_answer() {
    let mut answer = Answer::new();
    assert_eq!(answer.figures(), None);
    let asked = answer.asked;
    let at = |ms| asked + Duration::from_millis(ms);
    answer.add("a", at(100));
    assert_eq!(answer.figures().unwrap(), "1 token, first after 100 ms");
    answer.add("b", at(600));
    answer.tokens = Some(11);
    assert_eq!(
        answer.figures().unwrap(),
        "11 tokens, 20.0 tokens/s, first after 100 ms"
    );
}

#[test]
fn a_model_can_not_steer_the_terminal() {
    assert_eq!(
        printable("a\x1b[2J\tb\u{9b}é\r\n"),
        "a\u{fffd}[2J\tb\u{fffd}é\u{fffd}\n"
    );
}
