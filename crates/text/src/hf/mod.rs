//! The files of a Hugging Face directory: `tokenizer.json` (the format of the `tokenizers` library,
//! version 1.0) and `tokenizer_config.json`.

mod components;
mod config;
mod pattern;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value as Json;
use spate_types::TokenId;

use crate::bpe::Bpe;
use crate::byte_level::{ByteLevel, ByteTokens, by_bytes};
use crate::sentencepiece::SentencePiece;
use crate::tokenizer::{Parts, Scheme};
use crate::vocab::{Ids, Kind, Vocab, Writing};
use crate::whole::{WholeToken, WholeTokens};
use crate::{TextError, Tokenizer};

use components::{Affixes, Shape};
pub use config::TemplateSource;
use config::TokenizerConfig;

/// What of `tokenizer.json` says how to tokenize. Truncation and padding are the caller's business,
/// as they are in `transformers`.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Json>,
    pre_tokenizer: Option<Json>,
    post_processor: Option<Json>,
    decoder: Option<Json>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: TokenId,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    dropout: Option<f64>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: HashMap<String, TokenId>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

/// The kind of model, read before the model itself, whose form depends on it.
#[derive(Deserialize)]
struct Outline {
    model: ModelKind,
}

#[derive(Deserialize)]
struct ModelKind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// A field that can't be served.
fn refuse(field: &str, problem: impl std::fmt::Display) -> TextError {
    TextError::File {
        file: "tokenizer.json",
        problem: format!("{field}: {problem}"),
    }
}

impl Tokenizer {
    /// Builds the tokenizer that a `tokenizer.json` describes. `tokenizer_config` is the
    /// `tokenizer_config.json` beside it: it names the begin- and end-of-sequence tokens.
    ///
    /// Byte-level BPE and SentencePiece-style BPE with byte fallback are known.
    ///
    /// # Errors
    /// [`TextError::File`] for files that are not JSON of this form, contradict themselves, or
    /// ask for anything else; the field is named.
    pub fn from_tokenizer_json(
        tokenizer: &[u8],
        tokenizer_config: Option<&[u8]>,
    ) -> Result<Self, TextError> {
        let malformed = |e: serde_json::Error| TextError::File {
            file: "tokenizer.json",
            problem: e.to_string(),
        };
        let outline: Outline = serde_json::from_slice(tokenizer).map_err(malformed)?;
        if let Some(kind) = outline.model.kind.filter(|kind| kind != "BPE") {
            return Err(refuse(
                "model.type",
                format!("{kind:?}; only \"BPE\" is supported"),
            ));
        }
        let json: TokenizerJson = serde_json::from_slice(tokenizer).map_err(malformed)?;
        let config = tokenizer_config.map(TokenizerConfig::parse).transpose()?;
        build(json, &config.unwrap_or_default())
    }
}

fn build(json: TokenizerJson, config: &TokenizerConfig) -> Result<Tokenizer, TextError> {
    check_model(&json.model)?;
    let shape = Shape::parse(&json)?;
    let (tokens, kinds) = tokens_by_id(&json, &shape)?;
    let ids: Ids = json
        .model
        .vocab
        .iter()
        .map(|(text, &id)| (text.as_str(), id))
        .collect();
    let bpe = Bpe::listed(json.model.merges.iter().enumerate().map(sides), &ids)?;
    let (composed, whole) = whole_tokens(&json.added_tokens, &shape);

    let writing = match shape {
        Shape::ByteLevel { .. } => Writing::ByteLevel,
        Shape::SentencePiece { .. } => Writing::SentencePiece,
    };
    let vocab = Vocab::new(&tokens, kinds, writing)?;
    let mut drops_leading_space = false;
    let scheme = match shape {
        Shape::ByteLevel { pre, nfc } => Scheme::ByteLevel(Box::new(ByteLevel {
            bpe,
            pre,
            bytes: ByteTokens::new(&ids, unknown(&json.model)?),
            whole_words: is_set(json.model.ignore_merges).then(|| by_bytes(&vocab)),
            nfc,
            composed: WholeTokens::new(composed)?,
        })),
        Shape::SentencePiece {
            prefix,
            drops_leading_space: drops,
        } => {
            drops_leading_space = drops;
            let scheme = SentencePiece::new(bpe, &ids, &vocab, prefix)?;
            Scheme::SentencePiece(Box::new(scheme))
        }
    };

    let id_of = |name: &str, text: Option<&str>| match text {
        None => Ok(None),
        Some(text) => {
            let added = json.added_tokens.iter().find(|t| t.content == text);
            let id = added.map(|t| t.id).or_else(|| ids.get(text).copied());
            id.map(Some).ok_or_else(|| TextError::File {
                file: "tokenizer_config.json",
                problem: format!("{name}: {text:?} is not in the vocabulary"),
            })
        }
    };
    let bos = id_of("bos_token", config.bos_token())?;
    let eos = id_of("eos_token", config.eos_token())?;
    let mut affixes = Affixes::parse(json.post_processor.as_ref())?;
    affixes.apply(config.add_bos_token, bos, config.add_eos_token, eos);
    Tokenizer::new(Parts {
        vocab,
        scheme,
        whole,
        bos: bos.or(affixes.prefix.first().copied()),
        eos_ids: eos.into_iter().collect(),
        prefix: affixes.prefix,
        suffix: affixes.suffix,
        drops_leading_space,
    })
}

fn check_model(model: &Model) -> Result<(), TextError> {
    let is_empty = |text: &Option<String>| text.as_deref().unwrap_or("").is_empty();
    if model.dropout.is_some_and(|d| d != 0.0) {
        return Err(refuse("model.dropout", "random merges are not supported"));
    }
    if !is_empty(&model.continuing_subword_prefix) {
        return Err(refuse(
            "model.continuing_subword_prefix",
            "is not supported",
        ));
    }
    if !is_empty(&model.end_of_word_suffix) {
        return Err(refuse("model.end_of_word_suffix", "is not supported"));
    }
    Ok(())
}

fn is_set(flag: Option<bool>) -> bool {
    flag.unwrap_or(false)
}

/// The unknown token, and whether a run of unknown bytes is one.
fn unknown(model: &Model) -> Result<Option<(TokenId, bool)>, TextError> {
    let Some(text) = &model.unk_token else {
        return Ok(None);
    };
    let id = model.vocab.get(text);
    let id = id.ok_or_else(|| {
        refuse(
            "model.unk_token",
            format!("{text:?} is not in the vocabulary"),
        )
    })?;
    Ok(Some((*id, is_set(model.fuse_unk))))
}

/// The two tokens of a merge.
fn sides((rank, merge): (usize, &Merge)) -> Result<(&str, &str), TextError> {
    match merge {
        Merge::Pair(left, right) => Ok((left, right)),
        Merge::Text(text) => text.split_once(' ').ok_or_else(|| {
            refuse(
                &format!("model.merges[{rank}]"),
                format!("{text:?} is not two tokens with a space between"),
            )
        }),
    }
}

/// Texts and kinds of all tokens. Ids that nothing names are reserved.
fn tokens_by_id(
    json: &TokenizerJson,
    shape: &Shape,
) -> Result<(Vec<String>, Vec<Kind>), TextError> {
    let vocab = &json.model.vocab;
    let added = json.added_tokens.iter().map(|t| t.id);
    let last = vocab.values().copied().chain(added).max();
    let named = vocab.len() + json.added_tokens.len();
    let n = last.map_or(0, |last| last as usize + 1);
    // Room for gaps, but not for an id of four billion.
    if n > 2 * named + 1024 {
        return Err(refuse(
            "model.vocab",
            format!("ids go up to {}, but there are only {named} tokens", n - 1),
        ));
    }
    let mut tokens = vec![String::new(); n];
    let mut kinds = vec![Kind::Reserved; n];
    for (text, &id) in vocab {
        if kinds[id as usize] != Kind::Reserved {
            return Err(refuse(
                "model.vocab",
                format!("two tokens have the id {id}"),
            ));
        }
        tokens[id as usize].clone_from(text);
        kinds[id as usize] = match shape {
            Shape::SentencePiece { .. } if is_byte_token(text) => Kind::Byte,
            _ => Kind::Normal,
        };
    }
    for (i, token) in json.added_tokens.iter().enumerate() {
        let field = format!("added_tokens[{i}]");
        if token.single_word {
            return Err(refuse(&field, "single_word is not supported"));
        }
        if token.content.is_empty() {
            return Err(refuse(&field, "content is empty"));
        }
        let (id, text) = (token.id as usize, &token.content);
        let elsewhere = vocab.get(text).is_some_and(|&other| other != token.id);
        if elsewhere || (kinds[id] != Kind::Reserved && tokens[id] != *text) {
            return Err(refuse(
                &field,
                format!(
                    "{text:?} has the id {id}, which contradicts model.vocab or another added token"
                ),
            ));
        }
        tokens[id].clone_from(text);
        kinds[id] = match token.special {
            true => Kind::Control,
            false => Kind::UserDefined,
        };
    }
    Ok((tokens, kinds))
}

fn is_byte_token(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The tokens to look for after normalizing, and the others. Control tokens are always looked for
/// as they are written; so is everything where normalizing only turns spaces into `▁`, whatever
/// `normalized` says.
fn whole_tokens(added: &[AddedToken], shape: &Shape) -> (Vec<WholeToken>, Vec<WholeToken>) {
    let composes = matches!(shape, Shape::ByteLevel { nfc: true, .. });
    let late = |t: &&AddedToken| composes && t.normalized && !t.special;
    let (late, early): (Vec<_>, Vec<_>) = added.iter().partition(late);
    let token = |t: &AddedToken| WholeToken {
        id: t.id,
        text: t.content.clone(),
        lstrip: t.lstrip,
        rstrip: t.rstrip,
    };
    (
        late.into_iter().map(token).collect(),
        early.into_iter().map(token).collect(),
    )
}
