//! `spate serve`: binds the port, loads the model behind it, and keeps both until the end.

mod banner;
mod load;
mod logging;
mod signals;
#[cfg(test)]
mod tests;
mod text;
mod vocab;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use spate_engine::EngineHandle;
use spate_server::{App, ServerConfig, ServerError};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::settings::{Loaded, LogFormat, LogLevel, SettingFlags, Settings};
use banner::Banner;
use load::Summary;
use signals::Signals;

/// How long clients have to read why the daemon failed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a failed process may take to end by itself: a driver's own clean-up can wait forever for
/// a GPU that hangs.
const LAST_RESORT: Duration = Duration::from_secs(5);

/// Serve a model over HTTP
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// Print all settings, with where each comes from, and exit
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    settings: SettingFlags,
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// Whatever should make a supervisor restart it or a person look: the process then exits non-zero.
pub(crate) async fn run(args: ServeArgs) -> Result<()> {
    let started = Instant::now();
    let Loaded { settings, origins } = args.settings.load()?;
    if args.print_config {
        print!("{}", settings.to_toml(&origins));
        return Ok(());
    }
    logging::init(settings.log_format, settings.log_level);
    let mut signals = Signals::install()?;
    let daemon = Daemon::bind(&settings).await?;

    let loading = tokio::select! {
        loading = daemon.load(&settings) => Some(loading?),
        () = signals.first() => None,
    };
    let Some((engine, summary)) = loading else {
        return daemon.drain().await;
    };
    let banner = Banner {
        settings: &settings,
        origins: &origins,
        summary: &summary,
        address: daemon.address,
        startup: started.elapsed(),
    };
    banner.show();
    let outcome = daemon.run_until(&mut signals, &engine).await;
    if outcome.is_err() {
        std::thread::spawn(|| {
            std::thread::sleep(LAST_RESORT);
            std::process::abort();
        });
    }
    outcome
}

/// A server in this process for `spate chat`.
pub(crate) struct Local {
    /// Where it listens.
    pub(crate) url: String,
    daemon: Daemon,
}

/// Loads the model behind a free port of the loopback interface.
pub(crate) async fn start_local(settings: Settings) -> Result<Local> {
    let settings = Settings {
        host: "127.0.0.1".into(),
        port: 0,
        ..settings
    };
    logging::init(LogFormat::Pretty, LogLevel::Warn);
    let daemon = Daemon::bind(&settings).await?;
    daemon.load(&settings).await?;
    Ok(Local {
        url: format!("http://{}", daemon.address),
        daemon,
    })
}

impl Local {
    /// Ends it; nothing is running any more by then.
    pub(crate) async fn stop(self) -> Result<()> {
        self.daemon.drain().await
    }
}

/// A bound port and the HTTP server behind it.
struct Daemon {
    address: SocketAddr,
    app: Arc<App>,
    /// Set to true to begin the drain.
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<(), ServerError>>,
}

impl Daemon {
    /// Binds the port first of all: if it is taken, nothing has been loaded for nothing, and until
    /// the model is there, probes get an answer that says so.
    async fn bind(settings: &Settings) -> Result<Self> {
        let config = ServerConfig {
            api_keys: settings.api_keys()?,
            max_body_bytes: usize::try_from(settings.max_body_size)?,
            max_connections: settings.max_connections,
            request_timeout: Some(settings.request_timeout).filter(|limit| *limit > Duration::ZERO),
            drain_timeout: settings.drain_timeout,
            ..ServerConfig::default()
        };
        let place = (settings.host.as_str(), settings.port);
        let listener = TcpListener::bind(place).await.with_context(|| {
            let advice = "is another server running there? choose a different --port or --host";
            format!(
                "can't listen on {}:{}; {advice}",
                settings.host, settings.port
            )
        })?;
        let address = listener.local_addr()?;
        let app = App::new(config);
        let (stop, mut stopped) = watch::channel(false);
        let server = tokio::spawn({
            let app = app.clone();
            async move {
                spate_server::serve(listener, app, async move {
                    // An error means that the sender is gone: then it is time to stop, too.
                    let _stop = stopped.wait_for(|stop| *stop).await;
                })
                .await
            }
        });
        Ok(Self {
            address,
            app,
            stop,
            server,
        })
    }

    /// Loads the model and opens the API.
    async fn load(&self, settings: &Settings) -> Result<(EngineHandle, Summary)> {
        let (settings, app) = (settings.clone(), self.app.clone());
        let loading = tokio::task::spawn_blocking(move || load::load(&settings, &app));
        let (model, summary) = loading.await.context("loading the model crashed")??;
        let engine = model.engine.clone();
        self.app.set_ready(model);
        Ok((engine, summary))
    }

    /// Serves until the first signal, then drains; a failure of the engine or the server ends it at
    /// once.
    async fn run_until(mut self, signals: &mut Signals, engine: &EngineHandle) -> Result<()> {
        let failure = tokio::select! {
            () = signals.first() => None,
            reason = engine.dead() => Some(anyhow!("the engine failed: {reason}")),
            ended = &mut self.server => bail!(match ended {
                Ok(Err(e)) => anyhow!(e),
                Ok(Ok(())) | Err(_) => anyhow!("the HTTP server ended by itself"),
            }),
        };
        if let Some(failure) = failure {
            tracing::error!("{failure:#}");
            // The streams have their error by now; a moment to write it to the sockets.
            let _cut_off = tokio::time::timeout(LAST_WORDS, self.drain()).await;
            return Err(failure);
        }
        tokio::select! {
            drained = self.drain() => drained?,
            reason = engine.dead() => bail!("the engine failed while draining: {reason}"),
        }
        engine.shutdown();
        tracing::info!("stopped");
        Ok(())
    }

    async fn drain(self) -> Result<()> {
        self.stop.send_replace(true);
        self.server
            .await
            .context("the HTTP server crashed")?
            .map_err(Into::into)
    }
}
