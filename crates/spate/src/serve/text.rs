//! The text side of an opened model: tokenizer, chat template, defaults of sampling.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use spate_model::{Gguf, HfDirectory, ModelError};
use spate_server::SamplingDefaults;
use spate_text::{ChatTemplate, TemplateSource, Tokenizer};

use crate::opened::OpenModel;

/// What turns requests into tokens and tokens into answers.
pub(super) struct Text {
    pub(super) tokenizer: Arc<Tokenizer>,
    /// `None`: the model does not chat.
    pub(super) template: Option<ChatTemplate>,
    pub(super) defaults: SamplingDefaults,
}

/// Reads what belongs to the model; the template at `template_path` replaces its own.
pub(super) fn load(model: &OpenModel, template_path: Option<&Path>) -> Result<Text> {
    let (tokenizer, own) = match model {
        OpenModel::Gguf(gguf) => of_gguf(gguf)?,
        OpenModel::Hf { directory, .. } => of_directory(directory)?,
        OpenModel::Dummy { directory, .. } => match directory.read(TOKENIZER)? {
            Some(_) => of_directory(directory)?,
            None => (Tokenizer::synthetic(directory.config().vocab_size)?, None),
        },
    };
    let source = match template_path {
        Some(path) => {
            let source = std::fs::read_to_string(path)
                .with_context(|| format!("can't read the chat template {}", path.display()))?;
            Some(TemplateSource::new(source))
        }
        None => own,
    };
    let template = source.map(|source| ChatTemplate::compile_all(&source, &tokenizer));
    Ok(Text {
        template: template.transpose().with_context(|| {
            template_path
                .unwrap_or(model.checkpoint().path())
                .display()
                .to_string()
        })?,
        tokenizer: Arc::new(tokenizer),
        defaults: match model.directory() {
            Some(directory) => sampling_defaults(directory)?,
            None => SamplingDefaults::default(),
        },
    })
}

const TOKENIZER: &str = "tokenizer.json";

fn of_gguf(gguf: &Gguf) -> Result<(Tokenizer, Option<TemplateSource>)> {
    let tokenizer = Tokenizer::from_vocab(super::vocab::vocab_spec(gguf.metadata())?)
        .context("the tokenizer in the GGUF file")?;
    let template = match gguf.chat_template() {
        None => None,
        Some(default) => Some(TemplateSource {
            default: default.to_owned(),
            tool_use: gguf
                .metadata()
                .get_str("tokenizer.chat_template.tool_use")?
                .map(str::to_owned),
        }),
    };
    Ok((tokenizer, template))
}

fn of_directory(directory: &HfDirectory) -> Result<(Tokenizer, Option<TemplateSource>)> {
    let shown = directory.path().display();
    let Some(json) = directory.read(TOKENIZER)? else {
        bail!("{shown}: the directory holds no {TOKENIZER}");
    };
    let config = directory.read("tokenizer_config.json")?;
    let jinja = directory
        .read("chat_template.jinja")?
        .map(String::from_utf8)
        .transpose()
        .with_context(|| format!("{shown}: chat_template.jinja is not UTF-8"))?;
    let tokenizer =
        Tokenizer::from_tokenizer_json(&json, config.as_deref()).and_then(|tokenizer| {
            Ok((
                tokenizer,
                TemplateSource::find(config.as_deref(), jinja.as_deref())?,
            ))
        });
    let (tokenizer, template) = tokenizer.with_context(|| format!("the text side of {shown}"))?;
    let ends = directory.generation_defaults()?.eos_ids;
    let tokenizer = tokenizer
        .with_eos_ids(&ends)
        .with_context(|| format!("{shown}: eos_token_id"))?;
    Ok((tokenizer, template))
}

fn sampling_defaults(directory: &HfDirectory) -> Result<SamplingDefaults, ModelError> {
    let given = directory.generation_defaults()?;
    let usual = SamplingDefaults::default();
    Ok(SamplingDefaults {
        temperature: given.temperature.unwrap_or(usual.temperature),
        top_p: given.top_p.unwrap_or(usual.top_p),
        top_k: given.top_k.unwrap_or(usual.top_k),
    })
}
