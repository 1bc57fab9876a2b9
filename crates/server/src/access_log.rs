//! One log line a request, written when its response has gone out or its client is gone.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use http_body::{Frame, SizeHint};
use spate_types::Timings;

use crate::app::App;
use crate::auth::OPEN_PATHS;
use crate::dto::Usage;

const REQUEST_ID: &str = "x-request-id";
const MAX_REQUEST_ID: usize = 128;
/// nginx's status for a client that left before there was an answer.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// What a handler notes down about its request; in the request's extensions.
#[derive(Default)]
pub(crate) struct Record(Mutex<Entry>);

#[derive(Default)]
struct Entry {
    request_id: String,
    response_id: Option<String>,
    usage: Option<Usage>,
    timings: Timings,
    finish: Option<&'static str>,
}

impl Record {
    fn entry(&self) -> MutexGuard<'_, Entry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the id that the request's body brought, when it is one that may stand in a header.
    pub(crate) fn set_request_id(&self, id: &str) {
        if is_sane(id.as_bytes()) {
            self.entry().request_id = id.to_owned();
        }
    }

    /// Marks the request as a generation, whose response has this id.
    pub(crate) fn set_response_id(&self, id: &str) {
        self.entry().response_id = Some(id.to_owned());
    }

    pub(crate) fn set_usage(&self, usage: &Usage) {
        self.entry().usage = Some(*usage);
    }

    /// Of several prompts the last one done counts.
    pub(crate) fn set_timings(&self, timings: &Timings) {
        self.entry().timings = *timings;
    }

    pub(crate) fn set_finish(&self, finish: &'static str) {
        self.entry().finish = Some(finish);
    }
}

/// An id may be anything printable of modest length: it goes into a header and into logs.
fn is_sane(id: &[u8]) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
}

fn client_request_id(headers: &HeaderMap) -> Option<String> {
    let mut values = headers.get_all(REQUEST_ID).iter();
    let only = values.next().filter(|_| values.next().is_none())?;
    let id = only.to_str().ok()?;
    is_sane(id.as_bytes()).then(|| id.to_owned())
}

/// Middleware around everything: gives the request an id and logs how it went.
pub(crate) async fn log_access(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = client_request_id(request.headers()).unwrap_or_else(|| app.make_request_id());
    let record = Arc::new(Record::default());
    record.entry().request_id = id;
    request.extensions_mut().insert(record.clone());
    let mut line = Line {
        record,
        method: request.method().clone(),
        // Never the path itself: a client chose it.
        route: request.extensions().get::<MatchedPath>().cloned(),
        status: CLIENT_CLOSED_REQUEST,
        started: Instant::now(),
    };
    let mut response = next.run(request).await;
    line.status = response.status().as_u16();
    if let Ok(id) = HeaderValue::from_str(&line.record.entry().request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.map(|body| Body::new(Logged { body, line }))
}

/// Writes its line when dropped.
struct Line {
    record: Arc<Record>,
    method: Method,
    route: Option<MatchedPath>,
    status: u16,
    started: Instant,
}

impl Drop for Line {
    fn drop(&mut self) {
        let entry = self.record.entry();
        let route = self.route.as_ref().map_or("unmatched", MatchedPath::as_str);
        let ms = |from: u64, to: u64| (from != 0 && to >= from).then(|| (to - from) as f64 / 1e3);
        let times = &entry.timings;
        let generation = entry.response_id.as_ref();
        let finish = generation.map(|_| entry.finish.unwrap_or("abort"));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "spate::access",
                    method = %self.method,
                    route,
                    status = self.status,
                    request_id = entry.request_id,
                    id = generation,
                    prompt_tokens = entry.usage.map(|u| u.prompt_tokens),
                    cached_tokens = entry.usage.map(|u| u.prompt_tokens_details.cached_tokens),
                    completion_tokens = entry.usage.map(|u| u.completion_tokens),
                    queue_ms = ms(times.arrived, times.scheduled),
                    ttft_ms = ms(times.arrived, times.first_token),
                    total_ms = self.started.elapsed().as_secs_f64() * 1e3,
                    finish,
                    "request"
                )
            };
        }
        // Probes come every few seconds for ever.
        if OPEN_PATHS.contains(&route) {
            line!(debug);
        } else {
            line!(info);
        }
    }
}

/// A body that holds the log line back until it is through.
struct Logged {
    body: Body,
    #[expect(dead_code, reason = "its drop writes the line")]
    line: Line,
}

impl http_body::Body for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a15_only_one_sane_request_id_is_taken_over() {
        let id_of = |values: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            }
            client_request_id(&headers)
        };
        assert_eq!(id_of(&[b"trace-1/a:b"]).as_deref(), Some("trace-1/a:b"));
        assert_eq!(id_of(&[&b"x".repeat(128)]).unwrap().len(), 128);
        assert_eq!(id_of(&[]), None);
        assert_eq!(id_of(&[b""]), None);
        assert_eq!(id_of(&[b"a", b"a"]), None);
        assert_eq!(id_of(&[b"two words"]), None);
        assert_eq!(id_of(&["\u{e9}".as_bytes()]), None);
        assert_eq!(id_of(&[&b"x".repeat(129)]), None);
    }
}
