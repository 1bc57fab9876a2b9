//! Hugging Face model directories: `config.json`, safetensors in one file or several, and what
//! belongs to them.

mod config;
mod expected;
mod generation;
mod names;
mod root;
mod rope;
mod safetensors;
#[cfg(test)]
mod tests;
mod unique;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use generation::GenerationDefaults;

use crate::data_file::DataFile;
use crate::quant::dequantize;
use crate::{Checkpoint, GgmlType, ModelConfig, ModelError, TensorInfo};
use config::HfConfig;
use names::{Fate, gguf_name};
use root::Root;
use safetensors::Safetensors;
use unique::Unique;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What pickled weights are called. Unpickling runs whatever code the file says.
pub const PICKLE_EXTENSIONS: [&str; 5] = ["bin", "pt", "pth", "pkl", "ckpt"];

/// The text files of a model directory and what they say about the model.
#[derive(Debug)]
pub struct HfDirectory {
    root: Root,
    config: HfConfig,
}

impl HfDirectory {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// When it's missing, malformed, or describes a model that can't be run.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let root = Root::open(path)?;
        let json = root.read(CONFIG)?.ok_or_else(|| ModelError::Model {
            file: path.to_owned(),
            problem: format!("not a model: the directory holds no {CONFIG}"),
        })?;
        let config = HfConfig::from_json(&json).map_err(|problem| ModelError::Model {
            file: path.join(CONFIG),
            problem,
        })?;
        Ok(Self { root, config })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.root.path()
    }

    /// What kind of transformer it is.
    pub fn config(&self) -> &ModelConfig {
        &self.config.model
    }

    /// Number format of the weights, as `config.json` has it.
    pub(crate) fn dtype(&self) -> GgmlType {
        self.config.dtype
    }

    /// See [`HfConfig::expected_tensors`].
    pub(crate) fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.config.expected_tensors()
    }

    /// The contents of one of the directory's files, such as `tokenizer.json`; `None` when there is
    /// none of that name.
    ///
    /// # Errors
    /// When it can't be read, is absurdly large, or is a link out of the directory.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
        self.root.read(name)
    }

    /// What `generation_config.json` recommends, with the ends of output that `config.json` names
    /// where the former names none.
    ///
    /// # Errors
    /// When it can't be read or its values are out of range.
    pub fn generation_defaults(&self) -> Result<GenerationDefaults, ModelError> {
        const NAME: &str = "generation_config.json";
        let mut defaults = match self.read(NAME)? {
            None => GenerationDefaults::default(),
            Some(json) => {
                GenerationDefaults::from_json(&json).map_err(|problem| ModelError::Model {
                    file: self.path().join(NAME),
                    problem,
                })?
            }
        };
        if defaults.eos_ids.is_empty() {
            defaults.eos_ids.clone_from(&self.config.eos_ids);
        }
        Ok(defaults)
    }
}

/// The weights of a Hugging Face model directory.
///
/// Its tensors are shown by GGUF's names, and as GGUF files hold them: the norms of Gemma, which
/// checkpoints store minus one, are float32 and whole.
#[derive(Debug)]
pub struct HfModel {
    path: PathBuf,
    config: ModelConfig,
    files: Vec<DataFile>,
    tensors: Vec<TensorInfo>,
    /// Norms that are stored minus one, by name, as they are in their files.
    minus_one: HashMap<String, TensorInfo>,
}

impl HfModel {
    /// Reads and checks the headers of the weight files.
    ///
    /// # Errors
    /// When a file is missing or malformed, lies outside of the directory, holds a tensor that the
    /// architecture does not have, or only pickled weights are there.
    pub fn open(directory: &HfDirectory) -> Result<Self, ModelError> {
        let config = &directory.config;
        let files = open_files(&directory.root)?;
        let mut model = Self {
            path: directory.path().to_owned(),
            config: config.model.clone(),
            tensors: Vec::new(),
            minus_one: HashMap::new(),
            files: Vec::new(),
        };
        for file in files {
            for tensor in file.tensors {
                model.add(tensor, config.tied)?;
            }
            model.files.push(file.file);
        }
        if !config.tied && model.tensor("output.weight").is_none() {
            return Err((&model as &dyn Checkpoint).error(
                "tensor `lm_head.weight` is missing, and `tie_word_embeddings` is not true",
            ));
        }
        Ok(model)
    }

    /// The weight files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(DataFile::path)
    }

    /// Takes a tensor of a file over, under its new name.
    fn add(&mut self, mut tensor: TensorInfo, tied: bool) -> Result<(), ModelError> {
        let sandwich = self.config.post_norms;
        match gguf_name(&tensor.name, sandwich, tied) {
            Some(Fate::Named(name)) => {
                tensor.name = name;
                if sandwich && tensor.name.ends_with("norm.weight") {
                    let elements = tensor.bytes / tensor.ggml_type.block_bytes();
                    self.minus_one.insert(tensor.name.clone(), tensor.clone());
                    tensor.ggml_type = GgmlType::F32;
                    tensor.bytes = elements * GgmlType::F32.block_bytes();
                }
                self.tensors.push(tensor);
                Ok(())
            }
            Some(Fate::Unused) => Ok(()),
            None => {
                let architecture = &self.config.architecture;
                let problem = format!(
                    "tensor `{}` is not known for architecture `{architecture}`",
                    tensor.name
                );
                Err((self as &dyn Checkpoint).error(problem))
            }
        }
    }
}

impl Checkpoint for HfModel {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> Result<ModelConfig, ModelError> {
        Ok(self.config.clone())
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_at(&self, tensor: &TensorInfo, start: usize, out: &mut [u8]) -> Result<(), ModelError> {
        let Some(stored) = self.minus_one.get(&tensor.name) else {
            return self.files[tensor.file].read_at(tensor, start, out);
        };
        let mut bytes = vec![0; stored.bytes];
        self.files[stored.file].read_at(stored, 0, &mut bytes)?;
        let mut values = vec![0.0; tensor.bytes / size_of::<f32>()];
        dequantize(stored.ggml_type, &bytes, &mut values)
            .expect("as many elements as the header says");
        let plus_one = values.iter().flat_map(|v| (v + 1.0).to_le_bytes());
        for (out, byte) in out.iter_mut().zip(plus_one.skip(start)) {
            *out = byte;
        }
        Ok(())
    }
}

/// The weight files: one, or those that the index names.
fn open_files(root: &Root) -> Result<Vec<Safetensors>, ModelError> {
    if let Some(path) = root.find(WEIGHTS)? {
        return Ok(vec![Safetensors::open(&path, 0)?]);
    }
    let refuse = |problem: String| ModelError::Model {
        file: root.path().join(INDEX),
        problem,
    };
    let Some(json) = root.read(INDEX)? else {
        return Err(no_weights(root));
    };
    let index: Index = serde_json::from_slice(&json).map_err(|e| refuse(e.to_string()))?;
    let Unique(places) = index.weight_map;
    let mut names: Vec<&str> = places.iter().map(|(_, file)| file.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let mut files = Vec::with_capacity(names.len());
    for (i, name) in names.iter().enumerate() {
        let path = root
            .find(name)?
            .ok_or_else(|| refuse(format!("the file `{name}` that it names is missing")))?;
        files.push(Safetensors::open(&path, i)?);
    }
    let place_of: HashMap<&str, &str> = places
        .iter()
        .map(|(tensor, file)| (tensor.as_str(), file.as_str()))
        .collect();
    let mut found = 0;
    for (file, name) in files.iter().zip(&names) {
        for tensor in &file.tensors {
            if place_of.get(tensor.name.as_str()) != Some(name) {
                let problem = format!("it does not say that `{}` is in `{name}`", tensor.name);
                return Err(refuse(problem));
            }
            found += 1;
        }
    }
    if found != places.len() {
        return Err(refuse(format!(
            "it names {} tensors, but the files hold {found} of them",
            places.len()
        )));
    }
    Ok(files)
}

#[derive(Deserialize)]
struct Index {
    /// The file of each tensor.
    weight_map: Unique<String>,
}

/// Says what is there instead.
fn no_weights(root: &Root) -> ModelError {
    let entries = std::fs::read_dir(root.path()).into_iter().flatten();
    let pickled = entries.flatten().map(|entry| entry.path()).find(|path| {
        let extension = path.extension().and_then(|e| e.to_str());
        extension.is_some_and(|e| PICKLE_EXTENSIONS.contains(&e))
    });
    match pickled {
        Some(path) => pickle_error(&path),
        None => ModelError::Model {
            file: root.path().to_owned(),
            problem: format!("the directory holds neither {WEIGHTS} nor {INDEX}"),
        },
    }
}

/// The refusal of a file of pickled weights.
pub fn pickle_error(path: &Path) -> ModelError {
    ModelError::Model {
        file: path.to_owned(),
        problem: "pickled weights can run any code when they are read, so they are not; use a \
                  safetensors or GGUF version of the model"
            .into(),
    }
}
