//! Server-sent events: a response whose body is produced as the client reads it.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, header};
use http_body::Frame;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::errors::ApiError;
use crate::generation::{Generation, Update};

/// What an endpoint's chunks look like. Each method appends whole events to `out`.
pub(crate) trait Chunks: Send + 'static {
    /// Before anything else.
    fn begin(&mut self, generation: &Generation, out: &mut Vec<u8>);
    /// For each update.
    fn update(&mut self, generation: &Generation, update: Update, out: &mut Vec<u8>);
    /// After the last update.
    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>);
}

/// Answers with an event stream.
///
/// Waits for the first update, so that a request which fails before its first token gets its real
/// status code; but not for longer than `ping`: then the stream begins with a comment, because
/// proxies give up on a silent connection.
///
/// # Errors
/// The request failed before its first token.
pub(crate) async fn respond(
    mut generation: Generation,
    mut chunks: impl Chunks,
    ping: Duration,
) -> Result<Response, ApiError> {
    let first = match timeout(ping, generation.next()).await {
        Ok(first) => Some(first?),
        Err(_) => None,
    };
    let (sender, receiver) = mpsc::channel(1);
    let producer = async move {
        let mut out = Vec::new();
        chunks.begin(&generation, &mut out);
        let mut updates = first;
        loop {
            match updates {
                None => out.extend_from_slice(b": ping\n\n"),
                Some(Some(batch)) => {
                    for update in batch {
                        chunks.update(&generation, update, &mut out);
                    }
                }
                Some(None) => {
                    chunks.end(&generation, &mut out);
                    out.extend_from_slice(b"data: [DONE]\n\n");
                    break;
                }
            }
            if !out.is_empty() && sender.send(std::mem::take(&mut out).into()).await.is_err() {
                return;
            }
            updates = match timeout(ping, generation.next()).await {
                Ok(Ok(batch)) => Some(batch),
                Err(_) => None,
                Ok(Err(e)) => {
                    out.extend_from_slice(b"data: ");
                    out.extend_from_slice(&e.body());
                    out.extend_from_slice(b"\n\n");
                    break;
                }
            };
        }
        // The reader is gone when this fails, and then nobody misses the end.
        let _gone = sender.send(out.into()).await;
    };
    let body = Body::new(Produced {
        producer: Some(Box::pin(producer)),
        receiver,
    });
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx buffers responses unless it is told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Appends one event.
pub(crate) fn push_event(out: &mut Vec<u8>, event: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, event).expect("response types have string keys only");
    out.extend_from_slice(b"\n\n");
}

/// A body made by a future that runs only when the connection asks for more: no task of its own, no
/// buffer beyond one frame, and dropping the body drops the future with all it holds.
struct Produced {
    producer: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    receiver: mpsc::Receiver<Bytes>,
}

impl http_body::Body for Produced {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(producer) = &mut self.producer
            && producer.as_mut().poll(cx).is_ready()
        {
            self.producer = None;
        }
        let frame = self.receiver.poll_recv(cx);
        frame.map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}
