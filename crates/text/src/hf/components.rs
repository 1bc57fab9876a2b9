use std::collections::HashMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use spate_types::TokenId;

use super::pattern::{Pattern, stage};
use super::{TokenizerJson, is_set, refuse};
use crate::TextError;
use crate::families::GPT2;
use crate::pretokenizer::{PreTokenizer, Stage};
use crate::sentencepiece::SpacePrefix;
use crate::vocab::META_SPACE;

#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
enum Normalizer {
    #[serde(rename = "NFC")]
    Nfc,
    Prepend {
        prepend: String,
    },
    Replace {
        pattern: Pattern,
        content: String,
    },
}

#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
enum Splitter {
    Split {
        pattern: Pattern,
        behavior: String,
        #[serde(default)]
        invert: bool,
    },
    Digits {
        #[serde(default)]
        individual_digits: bool,
    },
    ByteLevel {
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Metaspace(Metaspace),
}

#[derive(Deserialize, Debug)]
struct Metaspace {
    replacement: char,
    add_prefix_space: Option<bool>,
    prepend_scheme: Option<String>,
    #[serde(default = "yes")]
    split: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
enum Decoder {
    ByteLevel,
    Replace {
        pattern: Pattern,
        content: String,
    },
    ByteFallback,
    Fuse,
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    Metaspace(Metaspace),
}

#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
enum PostProcessor {
    ByteLevel,
    TemplateProcessing(Template),
}

#[derive(Deserialize, Debug)]
struct Template {
    single: Vec<Piece>,
    special_tokens: HashMap<String, SpecialToken>,
}

#[derive(Deserialize, Debug)]
enum Piece {
    /// The text.
    Sequence {},
    SpecialToken {
        id: String,
    },
}

#[derive(Deserialize, Debug)]
struct SpecialToken {
    ids: Vec<TokenId>,
}

/// The shapes of tokenizer that we have.
pub(super) enum Shape {
    ByteLevel {
        pre: PreTokenizer,
        nfc: bool,
    },
    SentencePiece {
        prefix: Option<SpacePrefix>,
        drops_leading_space: bool,
    },
}

impl Shape {
    pub(super) fn parse(json: &TokenizerJson) -> Result<Self, TextError> {
        let normalizers = components("normalizer", "normalizers", json.normalizer.as_ref())?;
        let splitters: Vec<Splitter> =
            components(SPLITTER, "pretokenizers", json.pre_tokenizer.as_ref())?;
        let decoders = components("decoder", "decoders", json.decoder.as_ref())?;
        if matches!(splitters.last(), Some(Splitter::ByteLevel { .. })) {
            return byte_level(&normalizers, &splitters, &decoders);
        }
        if !is_set(json.model.byte_fallback) {
            return Err(refuse(
                "model.byte_fallback",
                "a tokenizer without it needs a pre_tokenizer that ends with ByteLevel",
            ));
        }
        if is_set(json.model.ignore_merges) {
            return Err(refuse(
                "model.ignore_merges",
                "is not supported with byte_fallback",
            ));
        }
        sentencepiece(&normalizers, &splitters, &decoders)
    }
}

const SPLITTER: &str = "pre_tokenizer";

/// The components in a field; sequences, whose parts are under `key`, are taken apart.
fn components<T: DeserializeOwned>(
    field: &str,
    key: &str,
    json: Option<&Json>,
) -> Result<Vec<T>, TextError> {
    let mut out = Vec::new();
    if let Some(json) = json {
        collect(field, key, json, &mut out)?;
    }
    Ok(out)
}

fn collect<T: DeserializeOwned>(
    field: &str,
    key: &str,
    json: &Json,
    out: &mut Vec<T>,
) -> Result<(), TextError> {
    if json["type"] != "Sequence" {
        out.push(T::deserialize(json).map_err(|e| refuse(field, e))?);
        return Ok(());
    }
    let parts = json[key].as_array();
    let parts = parts.ok_or_else(|| refuse(field, format!("a Sequence has no list {key:?}")))?;
    for (i, part) in parts.iter().enumerate() {
        collect(&format!("{field}.{key}[{i}]"), key, part, out)?;
    }
    Ok(())
}

fn byte_level(
    normalizers: &[Normalizer],
    splitters: &[Splitter],
    decoders: &[Decoder],
) -> Result<Shape, TextError> {
    if normalizers.iter().any(|n| !matches!(n, Normalizer::Nfc)) {
        return Err(refuse(
            "normalizer",
            "only NFC is supported with a ByteLevel pre_tokenizer",
        ));
    }
    if !matches!(decoders, [Decoder::ByteLevel]) {
        return Err(refuse(
            "decoder",
            "must be ByteLevel, as the pre_tokenizer is",
        ));
    }
    let mut stages = Vec::new();
    for (i, splitter) in splitters.iter().enumerate() {
        let is_last = i + 1 == splitters.len();
        stages.extend(
            splitter
                .stage(is_last)
                .map_err(|why| refuse(SPLITTER, why))?,
        );
    }
    Ok(Shape::ByteLevel {
        pre: PreTokenizer::new(stages),
        nfc: !normalizers.is_empty(),
    })
}

impl Splitter {
    /// The splitting that this asks for, if any.
    fn stage(&self, is_last: bool) -> Result<Option<Stage>, String> {
        match self {
            Self::Split {
                pattern: Pattern::Regex(pattern),
                behavior,
                invert,
            } => {
                let stage = stage(pattern).map_err(|e| format!("Split on {pattern:?}: {e}"))?;
                match (behavior.as_str(), invert) {
                    ("Isolated", _) => Ok(Some(stage)),
                    ("Removed", true) => Ok(Some(stage.dropping_gaps())),
                    _ => Err(format!(
                        "Split with behavior {behavior:?} and invert {invert} is not supported"
                    )),
                }
            }
            Self::Digits { individual_digits } => {
                let pattern = if *individual_digits {
                    r"\p{N}"
                } else {
                    r"\p{N}+"
                };
                stage(pattern).map(Some)
            }
            Self::ByteLevel {
                add_prefix_space: true,
                ..
            } => Err("ByteLevel with add_prefix_space is not supported".into()),
            Self::ByteLevel { use_regex, .. } if is_last => match use_regex {
                true => Stage::new(GPT2, true).map(Some).map_err(|e| e.to_string()),
                false => Ok(None),
            },
            other => Err(format!("{other:?} is not supported before ByteLevel")),
        }
    }
}

fn sentencepiece(
    normalizers: &[Normalizer],
    splitters: &[Splitter],
    decoders: &[Decoder],
) -> Result<Shape, TextError> {
    let (mut replaces, mut prefix) = (false, None);
    for normalizer in normalizers {
        match normalizer {
            Normalizer::Prepend { prepend } if is_meta_space(prepend) => {
                prefix = Some(SpacePrefix {
                    at_start_only: false,
                    unless_space: false,
                });
            }
            Normalizer::Replace {
                pattern: Pattern::String(space),
                content,
            } if space == " " && is_meta_space(content) => replaces = true,
            other => {
                return Err(refuse(
                    "normalizer",
                    format!("{other:?} is not supported with byte_fallback"),
                ));
            }
        }
    }
    match splitters {
        [] if replaces => {}
        // Finds nothing: there is no space left.
        [
            Splitter::Split {
                pattern: Pattern::String(space),
                ..
            },
        ] if replaces && space == " " => {}
        [Splitter::Metaspace(metaspace)] if prefix.is_none() => prefix = metaspace.prefix()?,
        [] => return Err(refuse("normalizer", "nothing replaces spaces by ▁")),
        other => {
            return Err(refuse(
                SPLITTER,
                format!("{other:?} is not supported with byte_fallback"),
            ));
        }
    }
    Ok(Shape::SentencePiece {
        prefix,
        drops_leading_space: drops_leading_space(decoders)?,
    })
}

impl Metaspace {
    fn prefix(&self) -> Result<Option<SpacePrefix>, TextError> {
        if self.replacement != META_SPACE || self.split {
            return Err(refuse(
                SPLITTER,
                "Metaspace is supported with replacement ▁ and split false only",
            ));
        }
        let scheme = match self.add_prefix_space {
            Some(false) => "never",
            _ => self.prepend_scheme.as_deref().unwrap_or("always"),
        };
        let at_start_only = match scheme {
            "never" => return Ok(None),
            "first" => true,
            "always" => false,
            other => {
                return Err(refuse(
                    SPLITTER,
                    format!("prepend_scheme {other:?} is not supported"),
                ));
            }
        };
        Ok(Some(SpacePrefix {
            at_start_only,
            unless_space: true,
        }))
    }
}

fn drops_leading_space(decoders: &[Decoder]) -> Result<bool, TextError> {
    let mut drops = false;
    for decoder in decoders {
        match decoder {
            Decoder::Replace {
                pattern: Pattern::String(meta),
                content,
            } if is_meta_space(meta) && content == " " => {}
            Decoder::ByteFallback | Decoder::Fuse => {}
            Decoder::Strip {
                content: ' ',
                start: 1,
                stop: 0,
            } => drops = true,
            Decoder::Metaspace(m) => {
                drops = m.add_prefix_space != Some(false)
                    && m.prepend_scheme.as_deref() != Some("never");
            }
            other => {
                return Err(refuse(
                    "decoder",
                    format!("{other:?} is not supported with byte_fallback"),
                ));
            }
        }
    }
    Ok(drops)
}

fn is_meta_space(text: &str) -> bool {
    text.chars().eq([META_SPACE])
}

/// The tokens that go before and after a prompt.
#[derive(Default)]
pub(super) struct Affixes {
    pub(super) prefix: Vec<TokenId>,
    pub(super) suffix: Vec<TokenId>,
}

impl Affixes {
    pub(super) fn parse(post_processor: Option<&Json>) -> Result<Self, TextError> {
        const FIELD: &str = "post_processor";
        let mut affixes = Self::default();
        for processor in components(FIELD, "processors", post_processor)? {
            let PostProcessor::TemplateProcessing(template) = processor else {
                continue;
            };
            let (mut before, mut after, mut texts) = (Vec::new(), Vec::new(), 0);
            for piece in &template.single {
                match piece {
                    Piece::Sequence { .. } => texts += 1,
                    Piece::SpecialToken { id } => {
                        let token = template.special_tokens.get(id).ok_or_else(|| {
                            refuse(FIELD, format!("{id:?} is not one of special_tokens"))
                        })?;
                        let side = if texts == 0 { &mut before } else { &mut after };
                        side.extend(&token.ids);
                    }
                }
            }
            if texts != 1 {
                return Err(refuse(FIELD, "single must hold the text exactly once"));
            }
            before.append(&mut affixes.prefix);
            affixes.prefix = before;
            affixes.suffix.append(&mut after);
        }
        Ok(affixes)
    }

    /// Puts `bos` before and `eos` after, or takes them away, where the configuration says so.
    pub(super) fn apply(
        &mut self,
        add_bos: Option<bool>,
        bos: Option<TokenId>,
        add_eos: Option<bool>,
        eos: Option<TokenId>,
    ) {
        if let (Some(add), Some(bos)) = (add_bos, bos) {
            self.prefix.retain(|&id| id != bos);
            if add {
                self.prefix.insert(0, bos);
            }
        }
        if let (Some(add), Some(eos)) = (add_eos, eos) {
            self.suffix.retain(|&id| id != eos);
            if add {
                self.suffix.push(eos);
            }
        }
    }
}
