//! What the end-to-end tests share: scratch directories, the daemon as a child process, and an HTTP
//! client simple enough to be trusted as an oracle.
#![allow(dead_code)] // each test target uses its part

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

pub(crate) const SPATE: &str = env!("CARGO_BIN_EXE_spate");

/// A directory of its own for each caller, removed when dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("scratch-{}-{n}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

/// The real model: `SPATE_TEST_MODEL`, or what `spate pull` fetches.
pub(crate) fn model() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        if let Some(path) = std::env::var_os("SPATE_TEST_MODEL") {
            return path.into();
        }
        let output = Command::new(SPATE).arg("pull").output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "these tests need the default model: {complaint}"
        );
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
    })
}

/// A port that nobody listens on.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Polls until `check` gives something.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A running daemon; killed when dropped.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) port: u16,
    /// The banner, line by line.
    pub(crate) banner: Vec<String>,
}

impl Daemon {
    /// The real model on a free port, with a small KV cache; waits until it is ready.
    pub(crate) fn start(extra: &[&str]) -> Self {
        Self::start_on(0, extra)
    }

    pub(crate) fn start_on(port: u16, extra: &[&str]) -> Self {
        Self::start_all(model(), port, extra)
    }

    /// Any model on a free port.
    pub(crate) fn start_with(model: &Path, extra: &[&str]) -> Self {
        Self::start_all(model, 0, extra)
    }

    fn start_all(model: &Path, port: u16, extra: &[&str]) -> Self {
        let mut child = Command::new(SPATE)
            .args([
                "serve",
                model.to_str().unwrap(),
                "--port",
                &port.to_string(),
            ])
            .args(["--served-model-name", "m", "--kv-cache-memory", "64MiB"])
            .args(extra)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut banner = Vec::new();
        let address = loop {
            let line = lines
                .next()
                .expect("the daemon ended before it was ready")
                .unwrap();
            banner.push(line);
            let line = banner.last().unwrap().trim();
            if let Some(rest) = line.strip_prefix("address") {
                break rest.trim().split(' ').next().unwrap().to_owned();
            }
        };
        let port = address.rsplit(':').next().unwrap().parse().unwrap();
        Self {
            child,
            port,
            banner,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        wait_for("the daemon's end", limit, || self.child.try_wait().unwrap())
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        request(self.port, "GET", path, &[], "").expect("the daemon answers")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        let headers = [("Content-Type", "application/json")];
        request(self.port, "POST", path, &headers, &body.to_string()).expect("the daemon answers")
    }

    /// Sends a streamed completion and leaves the connection open.
    pub(crate) fn open_stream(&self, body: &Value) -> BufReader<TcpStream> {
        let headers = [("Content-Type", "application/json")];
        let body = body.to_string();
        BufReader::new(send(self.port, "POST", "/v1/completions", &headers, &body).unwrap())
    }

    /// The value of a metric without labels other than the model's.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text;
        let line = text.lines().find(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let line = line.unwrap_or_else(|| panic!("no metric {name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// A field of `/proc/PID/status`, in bytes.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib * 1024
    }

    /// User and system time so far, in clock ticks (a hundredth of a second).
    pub(crate) fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// An HTTP answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The data of each server-sent event.
    pub(crate) fn events(&self) -> Vec<&str> {
        self.text
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect()
    }
}

/// One request on a connection of its own. `None`: no answer.
pub(crate) fn request(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Option<Answer> {
    read_answer(&mut BufReader::new(send(
        port, method, path, headers, body,
    )?))
}

fn send(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    stream.write_all(head.as_bytes()).ok()?;
    Some(stream)
}

pub(crate) fn read_answer(reader: &mut BufReader<TcpStream>) -> Option<Answer> {
    let mut status_line = String::new();
    reader.read_line(&mut status_line).ok()?;
    let status = status_line.split(' ').nth(1)?.parse().ok()?;
    let mut is_chunked = false;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        is_chunked |= line
            .to_ascii_lowercase()
            .starts_with("transfer-encoding: chunked");
        if line.trim().is_empty() {
            break;
        }
    }
    let mut bytes = Vec::new();
    if is_chunked {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).ok()?;
            if size == 0 {
                break;
            }
            bytes.extend_from_slice(&chunk[..size]);
        }
    } else {
        reader.read_to_end(&mut bytes).ok()?;
    }
    Some(Answer {
        status,
        text: String::from_utf8(bytes).expect("answers are UTF-8"),
    })
}
