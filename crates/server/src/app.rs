use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use spate_engine::{EngineHandle, Health, StepReport};
use spate_text::{ChatTemplate, Tokenizer};
use spate_types::RequestId;
use tokio::sync::Semaphore;
use tokio::sync::watch;

use crate::auth::ApiKeys;
use crate::config::ServerConfig;
use crate::errors::ApiError;
use crate::metrics::{EngineMetrics, Metrics};

/// Sampling where a request says nothing: OpenAI's defaults unless the model brings its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// In 0 ..= 2.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
        }
    }
}

/// A loaded model and the engine that runs it.
pub struct ServedModel {
    /// The name in `/v1/models` and in responses to requests that name none.
    pub id: String,
    /// Further names that requests may use.
    pub aliases: Vec<String>,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// `None`: the model does not chat.
    pub template: Option<ChatTemplate>,
    /// Where its requests run.
    pub engine: EngineHandle,
    /// Most tokens of prompt and output together.
    pub max_model_len: u32,
    /// Sampling where a request says nothing.
    pub defaults: SamplingDefaults,
    /// Names the build and the weights (`system_fingerprint`).
    pub fingerprint: String,
    /// Where it runs, such as `cpu` or `cuda:0`.
    pub device: String,
    /// What its memory there went to, in bytes.
    pub memory: Vec<(&'static str, u64)>,
}

impl ServedModel {
    /// The name to tell back to a client that asked for `name`.
    pub(crate) fn resolve_name(&self, name: Option<String>) -> Result<String, ApiError> {
        match name {
            None => Ok(self.id.clone()),
            Some(name) if self.is_called(&name) => Ok(name),
            Some(name) => Err(ApiError {
                param: Some("model".into()),
                ..ApiError::new(
                    http::StatusCode::NOT_FOUND,
                    format!(
                        "the model '{}' does not exist; '{}' is served here",
                        name.chars().take(64).collect::<String>().escape_debug(),
                        self.id
                    ),
                )
            }
            .with_code("model_not_found")),
        }
    }

    pub(crate) fn is_called(&self, name: &str) -> bool {
        name == self.id || self.aliases.iter().any(|alias| alias == name)
    }

    /// Every token id is below it.
    pub(crate) fn vocab_size(&self) -> u32 {
        self.engine.capacity().vocab_size
    }

    /// Most sequences that one request may have.
    pub(crate) fn max_sequences(&self) -> u32 {
        self.engine.config().scheduler.max_live()
    }
}

/// What a handler works with once a model is there.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) app: Arc<App>,
    pub(crate) model: Arc<ServedModel>,
}

/// How far the start is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Loading {
    pub(crate) stage: String,
    pub(crate) percent: f32,
}

/// What probes are told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Readiness {
    Ready,
    Loading(Loading),
    Draining,
    Stalled { seconds: f64 },
    Dead(String),
}

/// The state behind all routes, from the moment the port is bound.
pub struct App {
    pub(crate) config: ServerConfig,
    pub(crate) keys: ApiKeys,
    pub(crate) metrics: Metrics,
    loading: Mutex<Loading>,
    model: OnceLock<Arc<ServedModel>>,
    draining: watch::Sender<bool>,
    text_workers: Arc<Semaphore>,
    /// Tells apart the ids of two runs of the process.
    run_id: u64,
    next_http_id: AtomicU64,
}

impl App {
    /// An app that is loading.
    pub fn new(config: ServerConfig) -> Arc<Self> {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            keys: ApiKeys::new(&config.api_keys),
            metrics: Metrics::new(),
            loading: Mutex::new(Loading {
                stage: "starting".into(),
                percent: 0.0,
            }),
            model: OnceLock::new(),
            draining: watch::Sender::new(false),
            text_workers: Arc::new(Semaphore::new(workers)),
            run_id: random_u64(),
            next_http_id: AtomicU64::new(1),
            config,
        })
    }

    /// Says how far loading is, for `/health`. `percent` is of this stage, 0 to 100.
    pub fn set_loading(&self, stage: &str, percent: f32) {
        *lock(&self.loading) = Loading {
            stage: stage.to_owned(),
            percent: percent.clamp(0.0, 100.0),
        };
    }

    /// The observer to give to `engine::start`: it keeps the metrics of the model `model_name`.
    /// One engine serves an app: call it once.
    pub fn observer(&self, model_name: &str) -> impl FnMut(&StepReport) + Send + 'static {
        let mut recorder = self.metrics.attach_engine(model_name);
        move |report| recorder.observe(report)
    }

    /// Opens the API. A second call changes nothing.
    pub fn set_ready(&self, model: ServedModel) {
        self.metrics.set_capacity(&model);
        // A drain that began while the model was loading holds for its engine too.
        if *self.draining.borrow() {
            model.engine.begin_drain();
        }
        let _first_wins = self.model.set(Arc::new(model));
    }

    /// Not ready from now on: new generations are refused, running ones go on.
    pub fn begin_drain(&self) {
        self.draining.send_replace(true);
        if let Some(model) = self.model.get() {
            model.engine.begin_drain();
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    pub(crate) fn readiness(&self) -> Readiness {
        let Some(model) = self.model.get() else {
            return match self.is_draining() {
                true => Readiness::Draining,
                false => Readiness::Loading(lock(&self.loading).clone()),
            };
        };
        match model.engine.health() {
            Health::Dead(reason) => Readiness::Dead(reason),
            Health::Stalled { seconds } => Readiness::Stalled { seconds },
            Health::Ok if self.is_draining() => Readiness::Draining,
            Health::Ok => Readiness::Ready,
        }
    }

    /// The model, once it is loaded; also while draining.
    pub(crate) fn model(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// What a handler needs, or the 503 that says why it is not there. Draining is no reason: what
    /// may not come in any more, the engine's admission refuses.
    pub(crate) fn context(self: &Arc<Self>) -> Result<Context, ApiError> {
        let Some(model) = self.model.get() else {
            let Loading { stage, percent } = lock(&self.loading).clone();
            let message = format!("the model is loading ({stage}, {percent:.0} %)");
            return Err(ApiError::unavailable(message, 1).with_code("loading"));
        };
        Ok(Context {
            app: self.clone(),
            model: model.clone(),
        })
    }

    pub(crate) fn engine_metrics(&self) -> Option<&Arc<EngineMetrics>> {
        self.metrics.engine()
    }

    /// Runs work that is linear in the size of a request (parsing, rendering, tokenizing) off the
    /// I/O threads, as many at a time as there are cores.
    pub(crate) async fn run_text_work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let permit = self.text_workers.clone().acquire_owned().await;
        let job = tokio::task::spawn_blocking(move || {
            // Held to the end of the work, even when the client is gone by then.
            let _permit = permit;
            work()
        });
        match job.await {
            Ok(value) => value,
            Err(e) => match e.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down and will not poll this task again.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// An id for a request that brought none. Never used as a key.
    pub(crate) fn make_request_id(&self) -> String {
        let id = self.next_http_id.fetch_add(1, Ordering::Relaxed);
        format!("req-{:016x}{id:08x}", self.run_id)
    }

    /// The `id` of a response.
    pub(crate) fn response_id(&self, prefix: &str, id: RequestId) -> String {
        format!("{prefix}-{:016x}{id}", self.run_id)
    }
}

/// A poisoned lock still guards a whole value here: each critical section is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sixty-four bits that differ from call to call and from run to run; not for secrets.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
