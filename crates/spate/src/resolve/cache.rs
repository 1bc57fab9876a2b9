//! The model cache: `<cache>/models/<name>/<file>.gguf`, or a link to a Hugging Face directory, one
//! directory a reference.
//!
//! A file appears under its final name only when it is whole, checked and on disk. One process
//! fetches into a directory at a time; whatever a killed one left behind is swept by the next.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};

use super::Reference;
use super::directory::{gguf_files, gguf_models, is_hf};
use super::progress::Progress;

/// Where fetched models live.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    models: PathBuf,
}

/// A cached model.
#[derive(Debug, PartialEq)]
pub(crate) struct Entry {
    /// The directory's name; `spate models remove` takes it.
    pub(crate) name: String,
    /// The model file, or its directory.
    pub(crate) path: PathBuf,
    /// Its size.
    pub(crate) bytes: u64,
    /// When it was fetched.
    pub(crate) modified: SystemTime,
}

impl Cache {
    /// `$XDG_CACHE_HOME/spate`, or `~/.cache/spate`.
    pub(crate) fn from_env() -> Result<Self> {
        let directory = |name: &str| {
            let value = PathBuf::from(std::env::var_os(name)?);
            // The XDG specification: a relative path is invalid and to be ignored.
            value.is_absolute().then_some(value)
        };
        let base = directory("XDG_CACHE_HOME")
            .or_else(|| directory("HOME").map(|home| home.join(".cache")))
            .ok_or_else(|| {
                anyhow!("no cache directory: set XDG_CACHE_HOME or HOME to an absolute path")
            })?;
        Ok(Self {
            models: base.join("spate").join("models"),
        })
    }

    /// The model that an earlier fetch of this reference left.
    pub(crate) fn find(&self, reference: &Reference) -> Option<PathBuf> {
        models_in(&self.directory(reference))
            .ok()?
            .into_iter()
            .next()
    }

    /// All models, by name.
    pub(crate) fn list(&self) -> Result<Vec<Entry>> {
        let directories = match fs::read_dir(&self.models) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            directories => {
                directories.with_context(|| format!("can't read {}", self.models.display()))?
            }
        };
        let mut entries = Vec::new();
        for directory in directories {
            let directory = directory?;
            for path in models_in(&directory.path()).unwrap_or_default() {
                entries.push(Entry {
                    name: directory.file_name().to_string_lossy().into_owned(),
                    bytes: size(&path)?,
                    modified: fs::metadata(&path)?.modified()?,
                    path,
                });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Removes a model by its name in the list, or by its reference.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let by_reference = || Reference::parse(name).ok().map(|r| self.directory(&r));
        let directory = self
            .list()?
            .iter()
            .find(|entry| entry.name == name)
            .map(|entry| self.models.join(&entry.name))
            .or_else(by_reference)
            .filter(|directory| directory.is_dir() && directory.parent() == Some(&self.models))
            .ok_or_else(|| anyhow!("'{name}' is not in the cache; `spate models` lists what is"))?;
        fs::remove_dir_all(&directory).map_err(|e| explain(e, "remove", &directory))
    }

    fn directory(&self, reference: &Reference) -> PathBuf {
        self.models.join(directory_name(reference))
    }

    /// Takes the directory of `reference` for this process; waits for another that fetches into it.
    pub(crate) fn lock(&self, reference: &Reference, progress: &mut Progress) -> Result<Slot> {
        let directory = self.directory(reference);
        fs::create_dir_all(&directory).map_err(|e| explain(e, "create", &directory))?;
        let path = directory.join(".lock");
        let file = File::create(&path).map_err(|e| explain(e, "create", &path))?;
        if !try_lock(&file)? {
            progress.note("another process is fetching this model; waiting for it");
            while !try_lock(&file)? {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        let slot = Slot {
            scratch: directory.join(".fetch"),
            directory,
            _lock: file,
        };
        slot.sweep()?;
        fs::create_dir(&slot.scratch).map_err(|e| explain(e, "create", &slot.scratch))?;
        Ok(slot)
    }
}

/// A model's directory, held by this process. Dropping it sweeps the scratch and frees the lock.
pub(crate) struct Slot {
    directory: PathBuf,
    scratch: PathBuf,
    _lock: File,
}

impl Slot {
    /// An empty directory on the cache's file system, for what is on its way.
    pub(crate) fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Makes the file `name` from what `fill` writes, checking the hash.
    pub(crate) fn store(
        &self,
        name: &str,
        total: u64,
        sha256: Option<&str>,
        progress: &mut Progress,
        fill: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<PathBuf> {
        let partial = self.scratch.join(name);
        let file = File::create_new(&partial).map_err(|e| explain(e, "create", &partial))?;
        progress.begin(&format!("unpacking {name}"), total);
        let mut hashed = Hashed::new(&file, progress);
        fill(&mut hashed).map_err(|e| advise(e, &partial))?;
        check_hash(&hashed.finish(), sha256, name)?;
        file.sync_all().map_err(|e| explain(e, "write", &partial))?;
        let path = self.directory.join(name);
        fs::rename(&partial, &path).map_err(|e| explain(e, "create", &path))?;
        self.sync()?;
        Ok(path)
    }

    /// Enters a file or directory that lives in another program's cache, checking the file's hash.
    pub(crate) fn link(
        &self,
        target: &Path,
        sha256: Option<&str>,
        progress: &mut Progress,
    ) -> Result<PathBuf> {
        let name = target
            .file_name()
            .ok_or_else(|| anyhow!("{} is not a file", target.display()))?;
        if sha256.is_some() {
            let mut file = File::open(target).map_err(|e| explain(e, "read", target))?;
            progress.begin("checking the SHA-256", file.metadata()?.len());
            let mut hashed = Hashed::new(io::sink(), progress);
            pump(&mut file, &mut hashed).map_err(|e| explain(e, "read", target))?;
            check_hash(&hashed.finish(), sha256, &target.display().to_string())?;
        }
        let path = self.directory.join(name);
        let partial = self.scratch.join(name);
        std::os::unix::fs::symlink(target, &partial).map_err(|e| explain(e, "create", &partial))?;
        // A rename replaces a link that leads nowhere any more.
        fs::rename(&partial, &path).map_err(|e| explain(e, "create", &path))?;
        self.sync()?;
        Ok(path)
    }

    fn sync(&self) -> Result<()> {
        let directory = File::open(&self.directory)?;
        directory
            .sync_all()
            .map_err(|e| explain(e, "write", &self.directory))
    }

    fn sweep(&self) -> Result<()> {
        match fs::remove_dir_all(&self.scratch) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(explain(e, "remove", &self.scratch))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // What can't be removed now, the next fetch sweeps, and complains.
        let _left = self.sweep();
    }
}

/// What an earlier fetch left in a reference's directory.
fn models_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut models = gguf_models(directory)?;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if is_hf(&path) {
            models.push(path);
        }
    }
    Ok(models)
}

/// Bytes of a model: of all files of a split one, or of a directory.
fn size(model: &Path) -> Result<u64> {
    let files: Vec<PathBuf> = if model.is_dir() {
        let entries = fs::read_dir(model)?.map(|entry| Ok(entry?.path()));
        entries.collect::<io::Result<_>>()?
    } else {
        let name = model.file_name().unwrap_or_default().to_string_lossy();
        let names = gguf_files(&name).into_iter();
        names.map(|name| model.with_file_name(name)).collect()
    };
    files.iter().map(|file| Ok(fs::metadata(file)?.len())).sum()
}

/// An alias's own name; for other references readable text and, as that may not be unique, a hash.
fn directory_name(reference: &Reference) -> String {
    let text = reference.to_string();
    if let Reference::Alias(_) = reference {
        return text;
    }
    let readable: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.=+".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(120)
        .collect();
    format!("{readable}-{}", &hex(&Sha256::digest(text.as_bytes()))[..8])
}

fn try_lock(file: &File) -> Result<bool> {
    // SAFETY: flock reads nothing but its arguments, and the descriptor is open for the call.
    let status = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if status == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
        _ => Err(anyhow!(error).context("can't lock the model cache")),
    }
}

/// Copies all of `reader`, in pieces large enough that hashing, not the calls, takes the time.
pub(super) fn pump(reader: &mut dyn Read, writer: &mut dyn Write) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut copied = 0;
    loop {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            return Ok(copied);
        }
        writer.write_all(&buffer[..n])?;
        copied += n as u64;
    }
}

/// Passes everything on, hashes it and tells how far it is.
struct Hashed<'a, W> {
    inner: W,
    hasher: Sha256,
    done: u64,
    progress: &'a mut Progress,
}

impl<'a, W: Write> Hashed<'a, W> {
    fn new(inner: W, progress: &'a mut Progress) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            done: 0,
            progress,
        }
    }

    /// The SHA-256 in hexadecimal.
    fn finish(self) -> String {
        self.progress.end();
        hex(&self.hasher.finalize())
    }
}

impl<W: Write> Write for Hashed<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.done += n as u64;
        self.progress.at(self.done);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn check_hash(hash: &str, expected: Option<&str>, what: &str) -> Result<()> {
    match expected {
        Some(expected) if expected != hash => {
            bail!("{what} is not the expected file: SHA-256 {hash}, expected {expected}")
        }
        _ => Ok(()),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Says what to do about the errors that a cache directory meets.
fn explain(error: io::Error, action: &str, path: &Path) -> anyhow::Error {
    let failed = format!("can't {action} {}{}", path.display(), advice(error.kind()));
    anyhow!(error).context(failed)
}

/// The same for an error with an I/O error somewhere in its chain.
fn advise(error: anyhow::Error, path: &Path) -> anyhow::Error {
    let kind = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind);
    match kind.map(advice) {
        None | Some("") => error,
        Some(advice) => error.context(format!("can't write {}{advice}", path.display())),
    }
}

fn advice(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (free some space, or set XDG_CACHE_HOME to a directory with more)"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            " (set XDG_CACHE_HOME to a directory that can be written)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn names_differ(a: &str, b: &str) -> bool {
        directory_name(&Reference::parse(a).unwrap())
            != directory_name(&Reference::parse(b).unwrap())
    }

    #[test]
    fn directories_are_readable_and_distinct() {
        let alias = Reference::parse(super::super::DEFAULT_MODEL).unwrap();
        assert_eq!(directory_name(&alias), "smollm2-135m-instruct");
        let hub = directory_name(&Reference::parse("hf:a/b:c.gguf").unwrap());
        assert!(hub.starts_with("hf-a-b-main-c.gguf-"), "{hub}");
        assert!(names_differ("hf:a/b-c", "hf:a-b/c"));
        assert!(names_differ("pip:a==1", "pip:a==1.0"));
    }
}
