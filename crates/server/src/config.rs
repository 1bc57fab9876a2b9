use std::time::Duration;

/// What the server is told at its start. Every limit on what comes from outside is here.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Keys that open the API (`Authorization: Bearer KEY`). Empty: no key is asked for.
    pub api_keys: Vec<String>,
    /// Largest request body, in bytes.
    pub max_body_bytes: usize,
    /// A request head must be complete this long after the connection is ready for one. It is also
    /// how long an idle kept-alive connection is held.
    pub header_timeout: Duration,
    /// A request body must be complete this long after its head.
    pub body_timeout: Duration,
    /// A response that the client does not read for this long is cut off, and its request aborted.
    pub write_timeout: Duration,
    /// Most header lines in a request.
    pub max_headers: usize,
    /// Most bytes in a request's header lines.
    pub max_header_bytes: usize,
    /// Connections served at once; further ones wait in the listener's backlog.
    pub max_connections: usize,
    /// Silence on an event stream after which a comment is sent, so that proxies keep it open.
    pub ping_interval: Duration,
    /// A generation that has not ended by then is given up; `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// How long a shutdown waits for running requests.
    pub drain_timeout: Duration,
    /// Largest `n`.
    pub max_n: u32,
    /// Most prompts in one completions request.
    pub max_prompts: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            max_body_bytes: 16 << 20,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            max_headers: 100,
            max_header_bytes: 64 << 10,
            max_connections: 4096,
            ping_interval: Duration::from_secs(15),
            request_timeout: None,
            drain_timeout: Duration::from_secs(30),
            max_n: 128,
            max_prompts: 128,
        }
    }
}
