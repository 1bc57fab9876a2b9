//! A model on this machine, opened: its headers are read and checked, its weights are not loaded yet.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use spate_model::{Checkpoint, DummyModel, Gguf, HfDirectory, HfModel, check_tensors};

use crate::settings::LoadFormat;

/// What makes random weights the same at each start.
const DUMMY_SEED: u64 = 0;

/// An opened model of any format.
pub(crate) enum OpenModel {
    /// GGUF: weights, vocabulary and template in one.
    Gguf(Gguf),
    /// A Hugging Face directory.
    Hf {
        directory: HfDirectory,
        weights: HfModel,
    },
    /// A Hugging Face directory of which the weights don't matter.
    Dummy {
        directory: HfDirectory,
        weights: DummyModel,
    },
}

impl OpenModel {
    /// Opens a file, or a directory with `config.json`.
    pub(crate) fn open(path: &Path, format: LoadFormat) -> Result<Self> {
        let model = match (path.is_dir(), format) {
            (false, LoadFormat::Auto) => Self::Gguf(Gguf::open(path)?),
            (false, LoadFormat::Dummy) => bail!(
                "{}: a file of weights; load_format dummy is for a directory with a config.json",
                path.display()
            ),
            (true, format) => {
                let directory = HfDirectory::open(path)?;
                match format {
                    LoadFormat::Auto => Self::Hf {
                        weights: HfModel::open(&directory)?,
                        directory,
                    },
                    LoadFormat::Dummy => Self::Dummy {
                        weights: DummyModel::new(&directory, DUMMY_SEED)?,
                        directory,
                    },
                }
            }
        };
        let checkpoint = model.checkpoint();
        check_tensors(checkpoint, &checkpoint.config()?)?;
        Ok(model)
    }

    /// Configuration and weights.
    pub(crate) fn checkpoint(&self) -> &dyn Checkpoint {
        match self {
            Self::Gguf(gguf) => gguf,
            Self::Hf { weights, .. } => weights,
            Self::Dummy { weights, .. } => weights,
        }
    }

    /// The directory, if it is one.
    pub(crate) fn directory(&self) -> Option<&HfDirectory> {
        match self {
            Self::Gguf(_) => None,
            Self::Hf { directory, .. } | Self::Dummy { directory, .. } => Some(directory),
        }
    }

    /// Whatever says which weights these are.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::Gguf(gguf) => gguf.files().map(Path::to_owned).collect(),
            Self::Hf { directory, weights } => {
                let config = directory.path().join("config.json");
                let weights = weights.files().map(Path::to_owned);
                std::iter::once(config).chain(weights).collect()
            }
            Self::Dummy { directory, .. } => vec![directory.path().join("config.json")],
        }
    }

    /// For people.
    pub(crate) fn format(&self) -> &'static str {
        match self {
            Self::Gguf(_) => "GGUF",
            Self::Hf { .. } => "safetensors",
            Self::Dummy { .. } => "random weights",
        }
    }
}
