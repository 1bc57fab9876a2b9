//! Connections: accepting them, bounding them, draining them.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, timeout_at};

use crate::app::App;
use crate::config::ServerConfig;
use crate::routes;

/// How long accepting pauses when the system has no file descriptor or memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why serving ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The listener is of no use any more.
    #[error("cannot accept connections on the listening socket: {0}")]
    Accept(#[source] io::Error),
}

/// Serves `app` on `listener` until `shutdown` resolves, then drains: the app turns unready at
/// once, new generations are refused while probes are still answered, running ones finish. Returns
/// when the last connection is closed, or when the drain time is over and the rest was cut off.
///
/// # Errors
/// The listener failed in a way that waiting does not mend.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    let mut server = Server::new(listener, app.clone());
    server.accept_until(shutdown).await?;

    app.begin_drain();
    let deadline = Instant::now() + app.config.drain_timeout;
    tracing::info!(
        seconds = app.config.drain_timeout.as_secs_f32(),
        "draining: no new generations, running ones may finish"
    );
    let idle = async {
        if let Some(model) = app.model() {
            model.engine.idle().await;
        }
    };
    // A timeout here leaves no time below either.
    server
        .accept_until(async {
            let _late = timeout_at(deadline, idle).await;
        })
        .await?;
    server.close(deadline).await;
    Ok(())
}

struct Server {
    listener: TcpListener,
    router: axum::Router,
    config: ServerConfig,
    /// One permit a connection.
    places: Arc<Semaphore>,
    connections: JoinSet<()>,
    /// Set once: connections close as soon as they are idle.
    closing: watch::Sender<bool>,
}

impl Server {
    fn new(listener: TcpListener, app: Arc<App>) -> Self {
        Self {
            listener,
            config: app.config.clone(),
            places: Arc::new(Semaphore::new(app.config.max_connections)),
            router: routes::router(app),
            connections: JoinSet::new(),
            closing: watch::Sender::new(false),
        }
    }

    async fn accept_until(&mut self, end: impl Future<Output = ()>) -> Result<(), ServerError> {
        let mut end = pin!(end);
        loop {
            // A place first: at the limit, connections wait in the backlog instead of in memory.
            let next = async {
                let place = self.places.clone().acquire_owned().await;
                (place, self.listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                () = &mut end => return Ok(()),
                next = next => next,
            };
            while self.connections.try_join_next().is_some() {}
            match accepted {
                Ok((stream, _)) => {
                    let connection = self.connection(stream);
                    self.connections.spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                Err(e) => match severity(&e) {
                    Severity::OneConnection => {}
                    Severity::Exhausted => {
                        tracing::warn!(error = %e, "accepting pauses");
                        sleep(ACCEPT_PAUSE).await;
                    }
                    Severity::Fatal => return Err(ServerError::Accept(e)),
                },
            }
        }
    }

    /// Serves one connection to its end.
    fn connection(&self, stream: TcpStream) -> impl Future<Output = ()> + Send + use<> {
        // Tokens go out as they come. A socket that refuses the option still works.
        let _slower = stream.set_nodelay(true);
        let io = TokioIo::new(Guarded::new(stream, self.config.write_timeout));
        let service = TowerToHyperService::new(self.router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.config.header_timeout)
            // The configured limits are checked in `routes`, which answers with an error object;
            // what exceeds even these gets hyper's bare 431.
            .max_headers(self.config.max_headers + 100)
            .max_buf_size(2 * self.config.max_header_bytes.max(8 << 10))
            .serve_connection(io, service);
        let mut closing = self.closing.subscribe();
        async move {
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                ended = &mut connection => ended,
                () = async { drop(closing.wait_for(|closing| *closing).await) } => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(e) = ended {
                tracing::debug!(error = %e, "connection ended");
            }
        }
    }

    /// Closes idle connections, waits for the others until `deadline`, then cuts them off.
    async fn close(mut self, deadline: Instant) {
        drop(self.listener);
        self.closing.send_replace(true);
        let all_closed = async { while self.connections.join_next().await.is_some() {} };
        if timeout_at(deadline, all_closed).await.is_err() {
            let open = self.connections.len();
            tracing::warn!(open, "drain time over: cutting off what is left");
            // Dropping their tasks drops their token streams, which aborts the requests.
            self.connections.shutdown().await;
        }
    }
}

enum Severity {
    /// A client that was gone before it was accepted.
    OneConnection,
    /// The system is short of something: later it may not be.
    Exhausted,
    /// The listener itself is broken.
    Fatal,
}

fn severity(e: &io::Error) -> Severity {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    match (e.kind(), e.raw_os_error()) {
        (ConnectionAborted | ConnectionReset | Interrupted, _) => Severity::OneConnection,
        (_, Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP)) => {
            Severity::Fatal
        }
        _ => Severity::Exhausted,
    }
}

/// A TCP stream on which a write that makes no progress for too long is an error.
struct Guarded {
    stream: TcpStream,
    patience: Duration,
    /// Runs while a write waits for the client to read.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Guarded {
    fn new(stream: TcpStream, patience: Duration) -> Self {
        Self {
            stream,
            patience,
            stalled: None,
        }
    }

    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        progress: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.stalled = None;
            return progress;
        }
        let patience = self.patience;
        let timer = self
            .stalled
            .get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, progress)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, progress)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
