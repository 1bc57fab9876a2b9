//! From settings to a running model: resolve, read, load, start the engine. Blocks; the readiness
//! probe tells how far it is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};
use spate_engine::{EngineConfig, SchedulerConfig};
use spate_executor::Capacity;
use spate_server::{App, ServedModel};

use super::text;
use crate::backend::{Backend, Loaded};
use crate::opened::OpenModel;
use crate::resolve::{Cache, Progress, Reference, resolve};
use crate::settings::{Settings, Sizes};

/// What the banner tells about the model.
pub(crate) struct Summary {
    pub(crate) model: String,
    pub(crate) path: PathBuf,
    pub(crate) architecture: String,
    pub(crate) has_template: bool,
    /// The backend and its device.
    pub(crate) backend: String,
    /// Part and bytes.
    pub(crate) memory: Vec<(&'static str, u64)>,
    /// Memory of the device, if it has its own.
    pub(crate) device_memory: Option<u64>,
    pub(crate) capacity: Capacity,
    pub(crate) sizes: Sizes,
    pub(crate) max_model_len: u32,
}

/// Loads the model that the settings name and starts its engine. Call it on a blocking thread of a
/// tokio runtime.
pub(crate) fn load(settings: &Settings, app: &Arc<App>) -> Result<(ServedModel, Summary)> {
    let reference = Reference::parse(&settings.model)?;
    let backend = Backend::choose(settings.device)?;
    let mut progress = Progress::new({
        let app = app.clone();
        Box::new(move |stage, percent| app.set_loading(stage, percent))
    });
    let resolved = resolve(&reference, &Cache::from_env()?, &mut progress)?;
    progress.end();

    app.set_loading("reading the model's headers", 0.0);
    let opened = OpenModel::open(&resolved.path, settings.load_format)?;
    let config = opened.checkpoint().config()?;
    if let Some(len) = settings.max_model_len
        && len as usize > config.context_len
    {
        bail!(
            "max_model_len is {len}, but the model was made for {0} tokens; start with --max-model-len {0} or auto",
            config.context_len
        );
    }
    let mut progress = |share: f32| app.set_loading("loading the weights", share * 100.0);
    let (loaded, text) = std::thread::scope(|scope| {
        let text = scope.spawn(|| text::load(&opened, settings.chat_template.as_deref()));
        let loaded = backend.load(opened.checkpoint(), settings, &mut progress);
        let text = text
            .join()
            .unwrap_or_else(|_| bail!("loading the tokenizer crashed"));
        (loaded, text)
    });
    let (loaded, text) = (loaded?, text?);
    if text.tokenizer.vocab_size() > config.vocab_size {
        bail!(
            "{}: {} tokens, but logits for only {}",
            resolved.path.display(),
            text.tokenizer.vocab_size(),
            config.vocab_size
        );
    }

    let Loaded {
        executor,
        device,
        sizes,
        description,
        memory,
        device_memory,
    } = loaded;
    let capacity = executor.capacity().clone();
    let max_model_len = max_model_len(settings, &capacity)?;
    let mut names = settings.served_model_name.iter().cloned();
    let id = names.next().unwrap_or(resolved.name);
    let engine_config = EngineConfig {
        scheduler: SchedulerConfig {
            max_num_seqs: sizes.max_num_seqs,
            max_batch_tokens: sizes.max_num_batched_tokens,
            max_model_len,
            max_waiting: settings.max_queue,
            prefix_caching: settings.enable_prefix_caching,
        },
        step_timeout: settings.step_timeout,
    };
    let engine = spate_engine::start(executor, engine_config, app.observer(&id))
        .context("can't start the engine's thread")?;

    let summary = Summary {
        model: id.clone(),
        architecture: config.architecture,
        has_template: text.template.is_some(),
        backend: description,
        memory: memory.clone(),
        device_memory,
        capacity,
        sizes,
        max_model_len,
        path: resolved.path.clone(),
    };
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let model = ServedModel {
        id,
        aliases: names.collect(),
        created,
        tokenizer: text.tokenizer,
        template: text.template,
        engine,
        max_model_len,
        defaults: text.defaults,
        fingerprint: fingerprint(&opened.files())?,
        device,
        memory,
    };
    Ok((model, summary))
}

/// What was asked for, if the KV cache can hold it; otherwise what it can hold.
fn max_model_len(settings: &Settings, capacity: &Capacity) -> Result<u32> {
    let fits = capacity.blocks.saturating_mul(capacity.block_size);
    match settings.max_model_len {
        Some(len) if len > fits => Err(anyhow!(
            "the KV cache holds {fits} tokens, max_model_len is {len}; start with --max-model-len {fits} or auto, \
             or with a larger --kv-cache-memory or --gpu-memory-utilization"
        )),
        Some(len) => Ok(len),
        None => Ok(capacity.max_seq_len.min(fits)),
    }
}

/// Names the build and the weights: equal fingerprints mean equal answers to a seeded request.
///
/// Of a file only its length and both ends are hashed: the header describes every tensor, and
/// hashing tens of gigabytes would hold the start up.
fn fingerprint(files: &[PathBuf]) -> Result<String> {
    const END: u64 = 1 << 20;
    let mut hasher = Sha256::new();
    hasher.update(env!("CARGO_PKG_VERSION"));
    for path in files {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        hasher.update(length.to_le_bytes());
        let mut buffer = vec![0; END.min(length) as usize];
        for offset in [0, length - buffer.len() as u64] {
            file.read_exact_at(&mut buffer, offset)?;
            hasher.update(&buffer);
        }
    }
    let hash = hasher.finalize();
    let short: String = hash
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(format!("spate-{}-{short}", env!("CARGO_PKG_VERSION")))
}
