use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use crate::ModelError;

/// Text files of a model are read whole; a tokenizer of 10^6 tokens takes some 30 MB.
const MAX_TEXT: u64 = 256 << 20;

/// The directory of a model. Nothing outside of it is read, whatever an index or a link in it says.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    /// Where its files may really be.
    allowed: Vec<PathBuf>,
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let real = path.canonicalize().map_err(|source| ModelError::Io {
            file: path.to_owned(),
            source,
        })?;
        let mut allowed = vec![real.clone()];
        // In a hub's cache `<repository>/snapshots/<commit>/*` link to `<repository>/blobs/*`.
        if let Some(snapshots) = real.parent()
            && snapshots.file_name() == Some(OsStr::new("snapshots"))
            && let Some(repository) = snapshots.parent()
        {
            allowed.push(repository.join("blobs"));
        }
        Ok(Self {
            path: path.to_owned(),
            allowed,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file of the model; `None` when there is none of that name.
    ///
    /// # Errors
    /// When the name or a link leads out of the directory.
    pub(super) fn find(&self, name: &str) -> Result<Option<PathBuf>, ModelError> {
        let path = self.path.join(name);
        let refuse = |problem: &str| ModelError::Model {
            file: path.clone(),
            problem: problem.to_owned(),
        };
        let mut parts = Path::new(name).components();
        if name.is_empty() || !parts.all(|part| matches!(part, Component::Normal(_))) {
            return Err(ModelError::Model {
                file: self.path.clone(),
                problem: format!("the name `{name}` leads out of the model's directory"),
            });
        }
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ModelError::Io { file: path, source }),
        };
        if !self.allowed.iter().any(|place| real.starts_with(place)) {
            return Err(refuse(
                "it is a link to a file outside of the model's directory, which is not followed",
            ));
        }
        if !real.is_file() {
            return Err(refuse("it is not a file"));
        }
        Ok(Some(path))
    }

    /// The contents of a text file of the model; `None` when there is none of that name.
    ///
    /// # Errors
    /// As [`find`](Self::find), and when it can't be read or is absurdly large.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
        let Some(path) = self.find(name)? else {
            return Ok(None);
        };
        let io = |source| ModelError::Io {
            file: path.clone(),
            source,
        };
        let size = std::fs::metadata(&path).map_err(io)?.len();
        if size > MAX_TEXT {
            return Err(ModelError::Model {
                problem: format!("it has {size} bytes, allowed are {MAX_TEXT}"),
                file: path,
            });
        }
        std::fs::read(&path).map(Some).map_err(io)
    }
}
