//! A small HTTP/1.1 client for OpenAI servers: what `chat` and `bench` need and no more. It adds as
//! little as possible between the socket and the clock.

mod sse;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use sse::SseParser;

type Connection = SendRequest<Full<Bytes>>;

/// Longest answer that is not a stream.
const MAX_ANSWER_BYTES: usize = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// One server, with a pool of kept-alive connections.
pub(crate) struct Client {
    /// `host:port`, as in the Host header.
    authority: String,
    /// What comes before `/v1`; usually nothing.
    prefix: String,
    authorization: Option<String>,
    idle: Mutex<Vec<Connection>>,
}

impl Client {
    /// # Errors
    /// When the URL is not `http://host[:port][/prefix]`.
    pub(crate) fn new(url: &str, api_key: Option<&str>) -> Result<Self> {
        if url.starts_with("https://") {
            bail!("{url}: https is not supported here; use http, through a local TLS proxy if need be");
        }
        let uri: http::Uri = url.parse().with_context(|| format!("'{url}' is not a URL"))?;
        let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            bail!("'{url}' is not of the form http://host[:port]");
        };
        let authority = match authority.port_u16() {
            Some(_) => authority.to_string(),
            None => format!("{authority}:80"),
        };
        // The base URLs that OpenAI's clients are given end in /v1; ours may, too.
        let prefix = uri.path().trim_end_matches('/').trim_end_matches("/v1");
        Ok(Self {
            authority,
            prefix: prefix.to_owned(),
            authorization: api_key.map(|key| format!("Bearer {key}")),
            idle: Mutex::new(Vec::new()),
        })
    }

    /// GET, the answer as JSON.
    pub(crate) async fn get(&self, path: &str) -> Result<Value> {
        let (response, connection) = self.send(Method::GET, path, Bytes::new()).await?;
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|e| anyhow!("the answer broke off: {e}"))?.to_bytes();
        self.give_back(connection);
        serde_json::from_slice(&body).context("the answer is not JSON")
    }

    /// POST of a request with `"stream": true`.
    pub(crate) async fn stream(&self, path: &str, body: Bytes) -> Result<EventStream<'_>> {
        let (response, connection) = self.send(Method::POST, path, body).await?;
        let kind = response.headers().get(header::CONTENT_TYPE);
        if !kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
            bail!("the server did not answer with an event stream");
        }
        Ok(EventStream {
            client: self,
            connection: Some(connection),
            body: response.into_body(),
            parser: SseParser::default(),
        })
    }

    /// The name of the model that is served, the first if there are several.
    pub(crate) async fn first_model(&self) -> Result<String> {
        let models = self.get("/v1/models").await?;
        let name = models["data"][0]["id"].as_str();
        Ok(name.ok_or_else(|| anyhow!("the server lists no model"))?.to_owned())
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<(Response<Incoming>, Connection)> {
        let request = || {
            let mut request = Request::builder()
                .method(&method)
                .uri(format!("{}{path}", self.prefix))
                .header(header::HOST, &self.authority)
                .header(header::USER_AGENT, concat!("spate/", env!("CARGO_PKG_VERSION")));
            if let Some(authorization) = &self.authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            if method == Method::POST {
                request = request.header(header::CONTENT_TYPE, "application/json");
            }
            request.body(Full::new(body.clone())).context("the request can't be built")
        };
        // A kept connection may have been closed by now: then a fresh one decides.
        if let Some(mut connection) = self.take_idle()
            && connection.ready().await.is_ok()
            && let Ok(response) = connection.send_request(request()?).await
        {
            return check(response).await.map(|response| (response, connection));
        }
        let mut connection = self.connect().await?;
        let response = connection.send_request(request()?).await;
        let response = response.with_context(|| format!("no answer from {}", self.authority))?;
        check(response).await.map(|response| (response, connection))
    }

    async fn connect(&self) -> Result<Connection> {
        let failed = || format!("can't connect to {}", self.authority);
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.authority));
        let stream = connecting.await.with_context(failed)?.with_context(failed)?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.with_context(failed)?;
        // Ends with the connection; its errors reach the request that runs on it.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn take_idle(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn give_back(&self, connection: Connection) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }
}

/// The server refused a request.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HTTP {}: {}", self.status.as_u16(), self.message)
    }
}

impl std::error::Error for Refusal {}

async fn check(response: Response<Incoming>) -> Result<Response<Incoming>> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = Limited::new(response.into_body(), 64 << 10).collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let parsed: Value = serde_json::from_slice(&body).unwrap_or_default();
    let message = parsed["error"]["message"].as_str().unwrap_or("no reason given");
    bail!(Refusal { status, message: message.to_owned() })
}

/// The events of one streamed answer.
pub(crate) struct EventStream<'a> {
    client: &'a Client,
    /// Goes back to the pool when the answer was read to its end; dropping it aborts the request.
    connection: Option<Connection>,
    body: Incoming,
    parser: SseParser,
}

impl EventStream<'_> {
    /// The next event; `None` after `[DONE]`.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            if let Some(data) = self.parser.next_event() {
                if data == "[DONE]" {
                    self.finish().await;
                    return Ok(None);
                }
                let event: Value = serde_json::from_str(&data).context("an event is not JSON")?;
                if let Some(message) = event["error"]["message"].as_str() {
                    bail!("the server gave up: {message}");
                }
                return Ok(Some(event));
            }
            match self.body.frame().await {
                Some(frame) => {
                    let frame = frame.context("the stream broke off")?;
                    if let Some(bytes) = frame.data_ref() {
                        self.parser.push(bytes).map_err(|e| anyhow!(e))?;
                    }
                }
                None => bail!("the stream ended without [DONE]"),
            }
        }
    }

    /// Reads what follows `[DONE]`, so that the connection can carry the next request.
    async fn finish(&mut self) {
        while let Some(frame) = self.body.frame().await {
            if frame.is_err() {
                self.connection = None;
            }
        }
        if let Some(connection) = self.connection.take() {
            self.client.give_back(connection);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn urls() {
        let client = Client::new("http://localhost:8000/v1/", None).unwrap();
        assert_eq!((client.authority.as_str(), client.prefix.as_str()), ("localhost:8000", ""));
        let client = Client::new("http://host/api/v1", None).unwrap();
        assert_eq!((client.authority.as_str(), client.prefix.as_str()), ("host:80", "/api"));
        for url in ["https://host", "host:80", "ftp://host", "http://", ""] {
            assert!(Client::new(url, None).is_err(), "{url}");
        }
    }
}
