//! A small HTTP/1.1 client for OpenAI servers: what `chat` and `bench` need and no more. It puts as
//! little as it can between the socket and the clock.

mod error;
mod sse;
#[cfg(test)]
pub(crate) mod test_server;
mod wire;

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;

pub(crate) use error::ClientError;
use sse::SseParser;
pub(crate) use wire::{Chunk, Usage};
use wire::{ErrorAnswer, Models};

type Connection = SendRequest<Full<Bytes>>;

/// Longest answer that is not a stream.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// Longest answer to a refused request that is read for its message.
const MAX_ERROR_BYTES: usize = 64 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a body may take to end after `[DONE]`; then its connection is given up.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// One server, with a pool of kept-alive connections.
pub(crate) struct Client {
    /// `host:port`.
    authority: String,
    /// What comes before `/v1`; usually nothing.
    prefix: String,
    authorization: Option<HeaderValue>,
    idle: Mutex<Vec<Connection>>,
}

impl Client {
    /// `url` is `http://host[:port][/prefix]`, with or without the `/v1` that ends the base URLs of
    /// other OpenAI clients.
    ///
    /// # Errors
    /// [`ClientError::Setup`] when the URL or the key can't be used.
    pub(crate) fn new(url: &str, api_key: Option<&str>) -> Result<Self, ClientError> {
        let setup = |message: String| Err(ClientError::Setup(message));
        let Ok(uri) = url.parse::<http::Uri>() else {
            return setup(format!(
                "'{url}' is not a URL such as http://127.0.0.1:8000"
            ));
        };
        if uri.scheme_str() == Some("https") {
            return setup(format!(
                "{url}: https is not built in; give the server's own http address, or that of a \
                 local proxy or tunnel which speaks TLS to it"
            ));
        }
        let (Some("http"), Some(authority), None) =
            (uri.scheme_str(), uri.authority(), uri.query())
        else {
            return setup(format!(
                "'{url}' is not of the form http://host[:port][/prefix]"
            ));
        };
        if authority.as_str().contains('@') {
            return setup("a URL with a user name is not supported; use --api-key".into());
        }
        let authorization = match api_key {
            None => None,
            Some(key) => match HeaderValue::from_str(&format!("Bearer {key}")) {
                Ok(mut value) => {
                    value.set_sensitive(true);
                    Some(value)
                }
                Err(_) => return setup("the API key has characters no header may have".into()),
            },
        };
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            authority: match authority.port() {
                Some(_) => authority.to_string(),
                None => format!("{}:80", authority.host()),
            },
            prefix: path.strip_suffix("/v1").unwrap_or(path).to_owned(),
            authorization,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// The name of the model that is served, the first if there are several.
    pub(crate) async fn first_model(&self) -> Result<String, ClientError> {
        let models: Models = self.get("/v1/models").await?;
        match models.data.into_iter().next() {
            Some(model) => Ok(model.id),
            None => Err(ClientError::Malformed("the server lists no model".into())),
        }
    }

    /// GET, the answer as JSON.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let (response, connection) = self.send(Method::GET, path, Bytes::new()).await?;
        let body = read_body(response, MAX_ANSWER_BYTES).await?;
        self.give_back(connection);
        serde_json::from_slice(&body)
            .map_err(|e| ClientError::Malformed(format!("the answer to GET {path}: {e}")))
    }

    /// POST of a JSON body that asks for a stream.
    pub(crate) async fn stream(
        &self,
        path: &str,
        body: Bytes,
    ) -> Result<EventStream<'_>, ClientError> {
        let (response, connection) = self.send(Method::POST, path, body).await?;
        let kind = response.headers().get(header::CONTENT_TYPE);
        if !kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
            let message = format!("the answer to POST {path} is not an event stream");
            return Err(ClientError::Malformed(message));
        }
        Ok(EventStream {
            client: self,
            connection: Some(connection),
            body: response.into_body(),
            parser: SseParser::default(),
            received: Instant::now(),
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, Connection), ClientError> {
        let mut request = self.request(method, path, body)?;
        while let Some(mut connection) = self.take_idle() {
            if connection.ready().await.is_err() {
                continue;
            }
            match connection.try_send_request(request).await {
                Ok(response) => return self.accept(response, connection).await,
                // Closed while it was idle: hyper hands the request back if none of it was sent.
                // One that was sent is never repeated: the failure is what is being measured.
                Err(mut e) => match e.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(ClientError::broken(e.into_error())),
                },
            }
        }
        let mut connection = self.connect().await?;
        let response = connection.send_request(request).await;
        self.accept(response.map_err(ClientError::broken)?, connection)
            .await
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let is_post = method == Method::POST;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(header::HOST, &self.authority)
            .header(
                header::USER_AGENT,
                concat!("spate/", env!("CARGO_PKG_VERSION")),
            );
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if is_post {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .header(header::ACCEPT, "text/event-stream");
        }
        request
            .body(Full::new(body))
            .map_err(|e| ClientError::Setup(format!("the request can't be built: {e}")))
    }

    async fn connect(&self) -> Result<Connection, ClientError> {
        let failed = |source| ClientError::Connect {
            authority: self.authority.clone(),
            source,
        };
        let connecting = timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.authority)).await;
        let stream = connecting
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        // Small requests must not wait for the acknowledgement of earlier ones.
        stream.set_nodelay(true).map_err(failed)?;
        let handshake = handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(ClientError::broken)?;
        // Ends with the connection; its errors reach the request that runs on it.
        tokio::spawn(connection);
        Ok(sender)
    }

    /// Lets a success through; makes an error of anything else.
    async fn accept(
        &self,
        response: Response<Incoming>,
        connection: Connection,
    ) -> Result<(Response<Incoming>, Connection), ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok((response, connection));
        }
        // Best effort: without a readable body the status has to do.
        let body = read_body(response, MAX_ERROR_BYTES).await;
        if body.is_ok() {
            self.give_back(connection);
        }
        let message = match serde_json::from_slice(&body.unwrap_or_default()) {
            Ok(ErrorAnswer { error }) => error.into_message(),
            Err(_) => status
                .canonical_reason()
                .unwrap_or("no reason given")
                .to_owned(),
        };
        Err(ClientError::Status {
            status: status.as_u16(),
            message,
        })
    }

    fn take_idle(&self) -> Option<Connection> {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
    }

    fn give_back(&self, connection: Connection) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
    }
}

async fn read_body(response: Response<Incoming>, limit: usize) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), limit).collect().await;
    Ok(body.map_err(ClientError::broken)?.to_bytes())
}

/// A chunk and when it came.
#[derive(Debug)]
pub(crate) struct Event {
    /// When the bytes that completed it were read from the socket; events of one read share it.
    pub(crate) at: Instant,
    pub(crate) chunk: Chunk,
}

/// The events of one streamed answer. Dropping it closes the connection, which ends the request.
pub(crate) struct EventStream<'a> {
    client: &'a Client,
    /// Goes back to the pool when the answer was read to its end.
    connection: Option<Connection>,
    body: Incoming,
    parser: SseParser,
    received: Instant,
}

impl EventStream<'_> {
    /// The next event; `None` after `[DONE]`.
    ///
    /// # Errors
    /// The server sent an error, or something that is no chunk, or the stream broke off.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if self.parser.advance() {
                let data = self.parser.data();
                if data == b"[DONE]" {
                    self.finish().await;
                    return Ok(None);
                }
                let mut chunk: Chunk = serde_json::from_slice(data)
                    .map_err(|e| ClientError::Malformed(format!("an event of the stream: {e}")))?;
                if let Some(error) = chunk.error.take() {
                    return Err(ClientError::Stream(error.into_message()));
                }
                let at = self.received;
                return Ok(Some(Event { at, chunk }));
            }
            let Some(frame) = self.body.frame().await else {
                return Err(ClientError::Unfinished);
            };
            if let Some(bytes) = frame.map_err(ClientError::broken)?.data_ref() {
                self.received = Instant::now();
                self.parser.push(bytes)?;
            }
        }
    }

    /// Reads what follows `[DONE]`, so that the connection can carry the next request.
    async fn finish(&mut self) {
        let end = async {
            while let Some(frame) = self.body.frame().await {
                if frame.is_err() {
                    return false;
                }
            }
            true
        };
        let is_clean = timeout(END_TIMEOUT, end).await == Ok(true);
        if let Some(connection) = self.connection.take().filter(|_| is_clean) {
            self.client.give_back(connection);
        }
    }
}

#[cfg(test)]
mod tests;
