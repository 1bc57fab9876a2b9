//! A scripted HTTP/1.1 server on loopback, for tests of what uses the client.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// What the server sends back, byte for byte.
#[derive(Clone)]
pub(crate) struct Reply {
    pub(crate) pieces: Vec<Vec<u8>>,
    /// Before each piece.
    pub(crate) pause: Duration,
    /// Close the connection afterwards.
    pub(crate) close: bool,
}

impl Reply {
    pub(crate) fn json(status: &str, body: &str) -> Self {
        let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n");
        let body = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
        Self::pieces(vec![body.into_bytes()])
    }

    /// An event stream, each piece one chunk of the transfer encoding.
    pub(crate) fn sse(pieces: &[&str]) -> Self {
        let head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\
                     transfer-encoding: chunked\r\n\r\n";
        let mut all = vec![head.to_vec()];
        all.extend(
            pieces
                .iter()
                .map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len()).into()),
        );
        all.push(b"0\r\n\r\n".to_vec());
        Self::pieces(all)
    }

    fn pieces(pieces: Vec<Vec<u8>>) -> Self {
        Self {
            pieces,
            pause: Duration::ZERO,
            close: false,
        }
    }
}

/// A request as it came.
pub(crate) struct Received {
    /// Method, path, version and headers.
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

/// What the server has seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) connections: AtomicUsize,
    pub(crate) requests: AtomicUsize,
    running: AtomicUsize,
    pub(crate) most_running: AtomicUsize,
}

/// Starts a server that answers with `handler`; gives its URL.
pub(crate) async fn start(
    handler: impl Fn(&Received) -> Reply + Send + Sync + 'static,
) -> (String, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (seen, handler) = (Arc::new(Seen::default()), Arc::new(handler));
    let shared = seen.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            shared.connections.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(connection(stream, handler.clone(), shared.clone()));
        }
    });
    (url, seen)
}

/// Until the client or a reply ends it.
async fn connection(
    stream: TcpStream,
    handler: Arc<impl Fn(&Received) -> Reply>,
    seen: Arc<Seen>,
) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await.ok()? == 0 {
                return None;
            }
        }
        let head = head.to_lowercase();
        let length = head.split("content-length: ").nth(1);
        let length = length.map_or(0, |rest| rest.lines().next().unwrap().parse().unwrap());
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;

        let running = seen.running.fetch_add(1, Ordering::SeqCst) + 1;
        seen.most_running.fetch_max(running, Ordering::SeqCst);
        seen.requests.fetch_add(1, Ordering::SeqCst);
        let reply = handler(&Received { head, body });
        let mut is_open = !reply.close;
        for (i, piece) in reply.pieces.iter().enumerate() {
            tokio::time::sleep(reply.pause).await;
            if i + 1 == reply.pieces.len() {
                // The client may send its next request as soon as it has the last piece.
                seen.running.fetch_sub(1, Ordering::SeqCst);
            }
            is_open &= stream.write_all(piece).await.is_ok();
        }
        if !is_open {
            return None;
        }
    }
}
