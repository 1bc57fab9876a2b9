//! A server on a real socket, over the simulated executor, and a client that speaks HTTP/1.1 by hand
//! (so that it can also speak it wrongly).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use spate_engine::{EngineConfig, EngineHandle, SchedulerConfig};
use spate_executor::{Capacity, Lane, SimConfig, SimExecutor};
use spate_server::{App, SamplingDefaults, ServedModel, ServerConfig, ServerError, serve};
use spate_text::{ChatTemplate, Tokenizer, VocabSpec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub(crate) const MODEL: &str = "sim-model";
pub(crate) const MAX_MODEL_LEN: u32 = 256;
pub(crate) const VOCAB: u32 = 3 + 256;
pub(crate) const EOS: u32 = 2;
/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// The token of an ASCII character.
pub(crate) fn token(c: char) -> u32 {
    3 + c as u32
}

/// A bias that makes the model say nothing but `c`.
pub(crate) fn only(c: char) -> Value {
    json!({ token(c).to_string(): 100 })
}

/// A bias that keeps the model to printable ASCII.
pub(crate) fn ascii_only() -> Value {
    let unwanted = (0..VOCAB).filter(|id| !(token(' ')..=token('~')).contains(id));
    unwanted
        .map(|id| (id.to_string(), Value::from(-100)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

pub(crate) struct Options {
    pub(crate) server: ServerConfig,
    pub(crate) sim: SimConfig,
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) template: bool,
    pub(crate) ready: bool,
}

impl Default for Options {
    fn default() -> Self {
        let capacity = Capacity {
            slots: 16,
            blocks: 128,
            block_size: 16,
            local: None,
            max_batch_tokens: 256,
            step_tokens: None,
            max_seq_len: MAX_MODEL_LEN,
            vocab_size: VOCAB,
            lanes: vec![Lane::Main],
            depth: 2,
        };
        Self {
            server: ServerConfig {
                drain_timeout: Duration::from_secs(5),
                ..ServerConfig::default()
            },
            sim: SimConfig::new(capacity),
            scheduler: SchedulerConfig {
                max_num_seqs: 16,
                max_batch_tokens: 256,
                max_model_len: MAX_MODEL_LEN,
                max_waiting: 64,
                prefix_caching: true,
            },
            template: true,
            ready: true,
        }
    }
}

impl Options {
    /// Steps take this long, so that a test can act in the middle of a generation.
    pub(crate) fn step_time(mut self, time: Duration) -> Self {
        self.sim.step_time = time;
        self
    }

    pub(crate) fn server(mut self, change: impl FnOnce(&mut ServerConfig)) -> Self {
        change(&mut self.server);
        self
    }
}

pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) app: Arc<App>,
    pub(crate) engine: EngineHandle,
    pub(crate) running: JoinHandle<Result<(), ServerError>>,
    shutdown: Option<oneshot::Sender<()>>,
    model: Option<ServedModel>,
}

pub(crate) async fn start(options: Options) -> Server {
    let app = App::new(options.server);
    let engine = spate_engine::start(
        Box::new(SimExecutor::new(options.sim)),
        EngineConfig {
            scheduler: options.scheduler,
            step_timeout: Duration::from_millis(500),
        },
        app.observer(MODEL),
    )
    .unwrap();
    let tokenizer = Arc::new(tokenizer());
    let template = options
        .template
        .then(|| ChatTemplate::compile(TEMPLATE, &tokenizer).unwrap());
    let model = ServedModel {
        id: MODEL.into(),
        aliases: vec!["org/sim".into()],
        created: 1_700_000_000,
        tokenizer,
        template,
        engine: engine.clone(),
        max_model_len: MAX_MODEL_LEN,
        defaults: SamplingDefaults::default(),
        fingerprint: "fp_sim".into(),
        device: "sim".into(),
        memory: vec![("weights", 42)],
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (shutdown, stopped) = oneshot::channel();
    let running = tokio::spawn(serve(listener, app.clone(), async move {
        stopped.await.ok();
    }));
    let mut server = Server {
        addr,
        app,
        engine,
        running,
        shutdown: Some(shutdown),
        model: Some(model),
    };
    if options.ready {
        server.set_ready();
    }
    server
}

pub(crate) async fn start_default() -> Server {
    start(Options::default()).await
}

const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
    + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Three control tokens, then one token per byte.
fn tokenizer() -> Tokenizer {
    // GPT-2's printable stand-ins for bytes.
    let mut next = 256;
    let bytes = (0..=255u32).map(|byte| match byte {
        33..=126 | 161..=172 | 174..=255 => char::from_u32(byte).unwrap(),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap()
        }
    });
    let mut spec = VocabSpec {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        bos: Some(0),
        eos: Some(EOS),
        add_bos: Some(false),
        ..VocabSpec::default()
    };
    for control in ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] {
        spec.tokens.push(control.into());
        spec.token_types.push(3);
    }
    for byte in bytes {
        spec.tokens.push(byte.into());
        spec.token_types.push(1);
    }
    Tokenizer::from_vocab(spec).unwrap()
}

impl Server {
    pub(crate) fn set_ready(&mut self) {
        self.app.set_ready(self.model.take().unwrap());
    }

    pub(crate) fn begin_shutdown(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], b"").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        let body = serde_json::to_vec(body).unwrap();
        self.post_raw(path, &body).await
    }

    pub(crate) async fn post_raw(&self, path: &str, body: &[u8]) -> Reply {
        let headers = [("Content-Type", "application/json")];
        self.request("POST", path, &headers, body).await
    }

    pub(crate) async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Reply {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        self.raw(&[format!("{head}\r\n").as_bytes(), body].concat())
            .await
    }

    /// Sends bytes as they are and reads until the server closes.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect().await;
        // The server may answer and close before it has read everything.
        stream.write_all(bytes).await.ok();
        read_reply(&mut stream).await
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Opens a streaming request and gives the connection as soon as `n` events have come.
    pub(crate) async fn open_stream(&self, body: &Value, n: usize) -> TcpStream {
        let body = serde_json::to_vec(body).unwrap();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = self.connect().await;
        stream
            .write_all(&[head.as_bytes(), &body].concat())
            .await
            .unwrap();
        let mut seen = Vec::new();
        while seen.windows(6).filter(|w| w == b"data: ").count() < n {
            let mut part = [0; 4096];
            let len = timeout(PATIENCE, stream.read(&mut part))
                .await
                .unwrap()
                .unwrap();
            assert_ne!(len, 0, "closed early: {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&part[..len]);
        }
        stream
    }

    /// A request whose answer never changes.
    pub(crate) async fn canary(&self) -> Vec<u64> {
        let body = json!({
            "model": MODEL, "prompt": "canary", "max_tokens": 24, "temperature": 0,
            "ignore_eos": true, "return_token_ids": true,
        });
        let reply = self.post("/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let ids = &reply.json()["choices"][0]["token_ids"];
        ids.as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap())
            .collect()
    }

    /// The value of a metric with the usual labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        self.metrics().await[name]
    }

    /// All metrics without labels of their own, and those with them as `name{label="value"}`.
    pub(crate) async fn metrics(&self) -> HashMap<String, f64> {
        let text = self.get("/metrics").await.text();
        let model = format!("model_name=\"{MODEL}\"");
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
                let own: Vec<_> = labels
                    .trim_end_matches('}')
                    .split(',')
                    .filter(|label| {
                        !label.is_empty() && *label != "engine=\"0\"" && *label != model
                    })
                    .collect();
                let name = match own.is_empty() {
                    true => name.to_owned(),
                    false => format!("{name}{{{}}}", own.join(",")),
                };
                (name, value.parse().unwrap())
            })
            .collect()
    }

    /// Waits until no request holds a block.
    pub(crate) async fn wait_idle(&self) {
        timeout(PATIENCE, self.engine.idle()).await.unwrap();
        self.wait_metric("vllm:kv_cache_usage_perc", 0.0).await;
        self.wait_metric("vllm:num_requests_running", 0.0).await;
        self.wait_metric("vllm:num_requests_waiting", 0.0).await;
    }

    pub(crate) async fn wait_metric(&self, name: &str, value: f64) {
        let started = Instant::now();
        loop {
            let now = self.metric(name).await;
            if now == value {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "{name} is {now}, not {value}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Posts JSON without borrowing a [`Server`], for tasks of their own.
pub(crate) async fn post_to(addr: SocketAddr, path: &str, body: &[u8]) -> Reply {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream
        .write_all(&[head.as_bytes(), body].concat())
        .await
        .unwrap();
    read_reply(&mut stream).await
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

/// Reads a response whose connection closes at its end.
pub(crate) async fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A reset after the response counts as its end.
    timeout(PATIENCE, stream.read_to_end(&mut bytes))
        .await
        .expect("the server neither answers nor closes")
        .ok();
    Reply::parse(&bytes)
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
            return Self {
                status: 0,
                headers: HashMap::new(),
                body: bytes.to_vec(),
            };
        };
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        let headers: HashMap<_, _> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let body = &bytes[end + 4..];
        let chunked = headers
            .get("transfer-encoding")
            .is_some_and(|v| v == "chunked");
        Self {
            status: status.parse().unwrap(),
            body: match chunked {
                true => dechunk(body),
                false => body.to_vec(),
            },
            headers,
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The error object, after checking its shape.
    pub(crate) fn error(&self) -> Value {
        let body = self.json();
        let error = body["error"].as_object().unwrap();
        assert_eq!(
            error.keys().collect::<Vec<_>>(),
            ["message", "type", "param", "code"]
        );
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()));
        body["error"].clone()
    }

    /// The data of all events; the stream must end with `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let (events, done) = self.events_so_far();
        assert!(done, "no [DONE]: {}", self.text());
        events
    }

    /// The data of all events, and whether the last one was `[DONE]`.
    pub(crate) fn events_so_far(&self) -> (Vec<Value>, bool) {
        let text = self.text();
        let mut data: Vec<_> = text
            .split_terminator("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .collect();
        let done = data.pop_if(|last| *last == "[DONE]").is_some();
        let parse = |event: &&str| serde_json::from_str(event).unwrap();
        (data.iter().map(parse).collect(), done)
    }
}

/// Joins the chunks; stops where the connection broke off.
fn dechunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|w| w == b"\r\n") {
        let len = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        let Some(chunk) = rest.get(end + 2..end + 2 + len) else {
            break;
        };
        if len == 0 {
            break;
        }
        body.extend_from_slice(chunk);
        rest = &rest[(end + 4 + len).min(rest.len())..];
    }
    body
}
