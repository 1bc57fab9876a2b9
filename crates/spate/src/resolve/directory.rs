//! What a directory holds: a Hugging Face model, or GGUF files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The text files of a Hugging Face model that are read, beside its weights.
pub(super) const TEXT_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
];

const INDEX: &str = "model.safetensors.index.json";
/// The weights of a model in one file.
pub(super) const WEIGHTS: &str = "model.safetensors";

/// The model in a directory that somebody named: the directory itself, or its one GGUF model.
pub(super) fn model_in(directory: &Path) -> Result<PathBuf> {
    let shown = directory.display();
    if is_hf(directory) {
        return Ok(directory.to_owned());
    }
    let mut files = gguf_models(directory)?;
    match files.len() {
        1 => Ok(files.remove(0)),
        // Without weights, for which random ones may stand in.
        0 if directory.join("config.json").is_file() => Ok(directory.to_owned()),
        0 => bail!("the directory {shown} holds neither a config.json nor a .gguf file"),
        n => bail!(
            "the directory {shown} holds {n} .gguf files; name one, such as {}",
            files[0].display()
        ),
    }
}

/// The directory's GGUF models, by name: of one in several files the first. A link that leads
/// nowhere is none.
pub(super) fn gguf_models(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("can't read {}", directory.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(begins_gguf_model) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Whether safetensors and their configuration are there.
pub(super) fn is_hf(directory: &Path) -> bool {
    let has = |name: &str| directory.join(name).is_file();
    has("config.json") && (has(WEIGHTS) || has(INDEX))
}

/// Whether a file of this name is a GGUF model, or the first file of one.
pub(super) fn begins_gguf_model(name: &str) -> bool {
    name.ends_with(".gguf") && split(name).is_none_or(|(_, number, _)| number == 1)
}

/// The names of all files of the GGUF model that this one belongs to, in order.
pub(super) fn gguf_files(name: &str) -> Vec<String> {
    match split(name) {
        None => vec![name.to_owned()],
        Some((stem, _, count)) => (1..=count)
            .map(|i| format!("{stem}-{i:05}-of-{count:05}.gguf"))
            .collect(),
    }
}

/// What to call the model in a file: its name without the numbers and the extension.
pub(super) fn stem(name: &str) -> &str {
    match split(name) {
        Some((stem, ..)) => stem,
        None => name.rsplit_once('.').map_or(name, |(stem, _)| stem),
    }
}

/// Takes `NAME-00002-of-00003.gguf` apart.
fn split(name: &str) -> Option<(&str, u32, u32)> {
    let five_digits = |text: &str| {
        let digits = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    Some((stem, five_digits(number)?, five_digits(count)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_split_models() {
        assert_eq!(
            gguf_files("d/m-00001-of-00002.gguf"),
            ["d/m-00001-of-00002.gguf", "d/m-00002-of-00002.gguf"]
        );
        assert_eq!(gguf_files("m-1-of-2.gguf"), ["m-1-of-2.gguf"]);
        assert_eq!(stem("m-1.5-00001-of-00002.gguf"), "m-1.5");
        assert_eq!((stem("m-1.5.gguf"), stem("m")), ("m-1.5", "m"));
        for (name, begins) in [
            ("m.gguf", true),
            ("m-00001-of-00003.gguf", true),
            ("m-00003-of-00003.gguf", false),
            ("m.safetensors", false),
        ] {
            assert_eq!(begins_gguf_model(name), begins, "{name}");
        }
    }
}
