//! Files from a Hugging Face hub, kept in its own cache (`HF_HOME`), so that other programs' files
//! are used and ours are theirs.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use http::StatusCode;
use spate_model::{HfDirectory, HfModel};

use super::directory::{TEXT_FILES, WEIGHTS, begins_gguf_model, gguf_files};
use super::progress::Progress;
use super::reference::HubReference;
use super::{REACH_TIMEOUT, STALL_TIMEOUT};

/// The model's files in the hub's cache, downloaded unless they are there: those of a GGUF model in
/// order, or the directory of a Hugging Face model.
pub(crate) fn fetch(reference: &HubReference, progress: &mut Progress) -> Result<Vec<PathBuf>> {
    if let Some(paths) = cached(reference) {
        return Ok(paths);
    }
    if std::env::var_os("HF_HUB_OFFLINE").is_some_and(|value| value != "0" && !value.is_empty()) {
        bail!("not in the hub's cache, and HF_HUB_OFFLINE is set");
    }
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".into());
    let mut builder = ApiBuilder::from_env()
        .with_endpoint(endpoint.trim_end_matches('/').to_owned())
        .with_progress(false);
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token.trim().to_owned()).filter(|t| !t.is_empty()));
    }
    let api = builder.build().context("can't set up the hub's client")?;

    progress.begin(&format!("asking {endpoint} for {}", reference.repo), 0);
    let info = info(&api.repo(repo(reference)), reference)?;
    let names: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
    let (files, is_directory) = wanted(&names, reference)?;
    let mut paths = Vec::new();
    for file in files {
        paths.push(download(&api, reference, file, progress)?);
    }
    if is_directory {
        let directory = paths.first().and_then(|path| path.parent());
        return Ok(vec![
            directory.context("a file has a directory")?.to_owned(),
        ]);
    }
    Ok(paths)
}

fn repo(reference: &HubReference) -> Repo {
    Repo::with_revision(
        reference.repo.clone(),
        RepoType::Model,
        reference.revision.clone(),
    )
}

/// In the hub's cache already, under the revision's name or as a commit that other programs fetched.
fn cached(reference: &HubReference) -> Option<Vec<PathBuf>> {
    let cache = Cache::from_env().repo(repo(reference));
    let find = |file: &str| {
        let commit = cache.pointer_path(&reference.revision).join(file);
        cache
            .get(file)
            .or_else(|| commit.is_file().then_some(commit))
    };
    if let Some(file) = &reference.file {
        return gguf_files(file).iter().map(|file| find(file)).collect();
    }
    let config = find("config.json")?;
    let directory = config.parent()?;
    // Whole only if all files of the weights are there.
    let weights = HfDirectory::open(directory).and_then(|d| HfModel::open(&d));
    weights.is_ok().then(|| vec![directory.to_owned()])
}

/// Asks what is in the repository: also the test of whether the hub can be reached at all.
fn info(repo: &ApiRepo, reference: &HubReference) -> Result<RepoInfo> {
    let request = repo
        .info_request()
        .config()
        .timeout_global(Some(REACH_TIMEOUT))
        .http_status_as_error(false)
        .build();
    let mut response = request
        .call()
        .map_err(|e| anyhow!("the hub is out of reach: {e}"))?;
    let place = format!("{}@{}", reference.repo, reference.revision);
    match response.status() {
        status if status.is_success() => response
            .body_mut()
            .read_json()
            .context("the hub's answer can't be read"),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            bail!("the hub does not open {place}: it may not exist, or need a token in HF_TOKEN")
        }
        StatusCode::NOT_FOUND => bail!("the hub has no {place}"),
        status => bail!("the hub answered {status} for {place}"),
    }
}

/// The files to download of those that the repository has, and whether they make a directory.
fn wanted(names: &[&str], reference: &HubReference) -> Result<(Vec<String>, bool)> {
    if let Some(file) = &reference.file {
        return Ok((gguf_files(file), false));
    }
    let repo = &reference.repo;
    let models: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| begins_gguf_model(name))
        .collect();
    match models[..] {
        [model] => Ok((gguf_files(model), false)),
        [] => {
            let has_one = names.contains(&WEIGHTS);
            let is_weights = |name: &str| match has_one {
                true => name == WEIGHTS,
                false => name.starts_with("model-") && name.ends_with(".safetensors"),
            };
            if !names.contains(&"config.json") || !names.iter().any(|name| is_weights(name)) {
                bail!("{repo} holds neither a .gguf file nor a config.json with safetensors");
            }
            let files = names
                .iter()
                .filter(|name| TEXT_FILES.contains(name) || is_weights(name));
            Ok((files.map(|name| (*name).to_owned()).collect(), true))
        }
        _ => bail!(
            "{repo} holds {} .gguf files; name one, such as hf:{repo}:{} (all: {})",
            models.len(),
            models[0],
            models.join(", ")
        ),
    }
}

/// What the downloading thread tells.
#[derive(Default)]
struct Transfer {
    total: AtomicU64,
    done: AtomicU64,
}

/// Adds up what the hub's client reports.
struct Reporter(Arc<Transfer>);

impl hf_hub::api::Progress for Reporter {
    fn init(&mut self, size: usize, _file: &str) {
        self.0.total.store(size as u64, Ordering::Relaxed);
        self.0.done.store(0, Ordering::Relaxed);
    }

    fn update(&mut self, size: usize) {
        self.0.done.fetch_add(size as u64, Ordering::Relaxed);
    }

    fn finish(&mut self) {}
}

/// Downloads on a thread of its own: the hub's client sets no time limits, so a transfer that
/// stands still can only be left behind.
fn download(
    api: &Api,
    reference: &HubReference,
    file: String,
    progress: &mut Progress,
) -> Result<PathBuf> {
    let transfer = Arc::new(Transfer::default());
    let reporter = Reporter(transfer.clone());
    let repo = api.repo(repo(reference));
    let (sender, result) = mpsc::channel();
    let name = file.clone();
    std::thread::Builder::new()
        .name("hub-download".into())
        .spawn(move || {
            // No receiver: the wait was given up.
            let _given_up = sender.send(repo.download_with_progress(&name, reporter));
        })?;

    let mut seen = 0;
    let mut moved = Instant::now();
    let mut begun = false;
    loop {
        let total = transfer.total.load(Ordering::Relaxed);
        let done = transfer.done.load(Ordering::Relaxed);
        if total > 0 && !begun {
            progress.begin(&format!("downloading {file}"), total);
            begun = true;
        }
        if begun && done != seen {
            progress.at(done);
            (seen, moved) = (done, Instant::now());
        }
        match result.recv_timeout(Duration::from_millis(100)) {
            Ok(path) => {
                progress.end();
                return path.with_context(|| format!("the download of {file} failed"));
            }
            Err(RecvTimeoutError::Timeout) if moved.elapsed() < STALL_TIMEOUT => {}
            Err(RecvTimeoutError::Timeout) => bail!(
                "the download of {file} stood still for {} s; start again to resume it",
                STALL_TIMEOUT.as_secs()
            ),
            Err(RecvTimeoutError::Disconnected) => bail!("the download of {file} crashed"),
        }
    }
}
