#![allow(clippy::unwrap_used)]

use spate_engine::{EngineConfig, SchedulerConfig};
use spate_executor::{Capacity, Lane, SimConfig, SimExecutor};
use spate_server::{SamplingDefaults, ServedModel};
use spate_text::Tokenizer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

const VOCAB: u32 = 300;
const CONTEXT: u32 = 512;
const STEP_TIMEOUT: Duration = Duration::from_millis(300);

/// A daemon over a simulated device.
async fn daemon(sim: SimConfig) -> (Daemon, EngineHandle) {
    let settings = Settings {
        port: 0,
        ..Settings::default()
    };
    let daemon = Daemon::bind(&settings).await.unwrap();
    let config = EngineConfig {
        scheduler: SchedulerConfig {
            max_num_seqs: 8,
            max_batch_tokens: 64,
            max_model_len: CONTEXT,
            max_waiting: 8,
            prefix_caching: true,
        },
        step_timeout: STEP_TIMEOUT,
    };
    let executor = Box::new(SimExecutor::new(sim));
    let engine = spate_engine::start(executor, config, daemon.app.observer("sim")).unwrap();
    daemon.app.set_ready(ServedModel {
        id: "sim".into(),
        aliases: Vec::new(),
        created: 0,
        tokenizer: Arc::new(Tokenizer::synthetic(VOCAB as usize).unwrap()),
        template: None,
        engine: engine.clone(),
        max_model_len: CONTEXT,
        defaults: SamplingDefaults::default(),
        fingerprint: "sim".into(),
        device: "sim".into(),
        memory: Vec::new(),
    });
    (daemon, engine)
}

fn sim() -> SimConfig {
    let mut sim = SimConfig::new(Capacity {
        slots: 8,
        blocks: 256,
        block_size: 16,
        local: None,
        max_batch_tokens: 64,
        step_tokens: None,
        max_seq_len: CONTEXT,
        vocab_size: VOCAB,
        lanes: vec![Lane::Main],
        depth: 2,
    });
    sim.step_time = Duration::from_millis(5);
    sim
}

/// A streamed completion, from its start to the end of its connection.
async fn stream(address: SocketAddr) -> String {
    let body = r#"{"prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": true, "stream": true}"#;
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_fails_ends_the_streams_and_the_process() {
    let mut lost = sim();
    lost.fatal_after = Some(5);
    let mut hung = sim();
    hung.hang_after = Some(5);
    let mut stuck = sim();
    stuck.stuck_after = Some(5);
    for (what, sim) in [("lost", lost), ("hung", hung), ("stuck", stuck)] {
        let (daemon, engine) = daemon(sim).await;
        let client = tokio::spawn(stream(daemon.address));
        let mut signals = Signals::install().unwrap();
        let end = tokio::time::timeout(
            Duration::from_secs(20),
            daemon.run_until(&mut signals, &engine),
        );
        let failure = end.await.expect("it ends").expect_err("and not well");
        assert!(
            failure.to_string().starts_with("the engine failed: "),
            "{what}: {failure}"
        );
        let answer = client.await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{what}: {answer}");
        assert!(
            answer.contains("\"type\":\"server_error\"") && !answer.contains("[DONE]"),
            "{what}: {answer}"
        );
    }
}
