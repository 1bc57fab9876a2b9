use spate_types::TokenId;

use crate::bpe::Bpe;
use crate::byte_level::{ByteLevel, ByteTokens, by_bytes};
use crate::families::Family;
use crate::sentencepiece::{SentencePiece, SpacePrefix};
use crate::tokenizer::{Parts, Scheme};
use crate::vocab::{Ids, Kind, Vocab, Writing};
use crate::whole::{WholeToken, WholeTokens};
use crate::{TextError, Tokenizer};

/// A vocabulary as a GGUF file states it (`tokenizer.ggml.*`).
#[derive(Debug, Clone, Default)]
pub struct VocabSpec {
    /// `tokenizer.ggml.model`: `"gpt2"` (byte-level BPE) or `"llama"` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: names the pre-tokenizer; absent in old files, which means `"default"`.
    /// Unused by SentencePiece.
    pub pre: Option<String>,
    /// Token texts by id; normal tokens are written in GPT-2's printable byte alphabet, or with `▁`
    /// for a space.
    pub tokens: Vec<String>,
    /// GGUF token types by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    /// Empty means all normal.
    pub token_types: Vec<i32>,
    /// Scores by id: the highest is merged first. Unused by byte-level BPE.
    pub scores: Vec<f32>,
    /// Merges `"left right"`, the most urgent first. Unused by SentencePiece.
    pub merges: Vec<String>,
    /// Begin of sequence.
    pub bos: Option<TokenId>,
    /// End of sequence.
    pub eos: Option<TokenId>,
    /// End of turn.
    pub eot: Option<TokenId>,
    /// Whether prompts start with `bos`; `None`: what is usual for the kind of
    /// vocabulary.
    pub add_bos: Option<bool>,
    /// Whether prompts end with `eos`; `None`: no.
    pub add_eos: Option<bool>,
    /// Whether a space is put before the text; `None`: yes for SentencePiece. Byte-level BPE does not.
    pub add_space_prefix: Option<bool>,
    /// Control tokens but `bos` and `eos` take along the whitespace after them, as Phi-3's do.
    pub control_rstrip: bool,
}

impl Kind {
    fn from_gguf(token_type: i32) -> Result<Self, TextError> {
        match token_type {
            1 => Ok(Self::Normal),
            6 => Ok(Self::Byte),
            3 => Ok(Self::Control),
            4 => Ok(Self::UserDefined),
            2 | 5 => Ok(Self::Reserved),
            other => Err(TextError::Vocab(format!(
                "token type {other} is not one of GGUF's (1 to 6)"
            ))),
        }
    }
}

/// Control tokens that end a turn. Many files name only one of a model's, or the one of its base.
const END_OF_TURN: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
];

impl Tokenizer {
    /// Builds the tokenizer of a GGUF vocabulary.
    ///
    /// # Errors
    /// [`TextError::Vocab`] for a kind of vocabulary other than `"gpt2"` and `"llama"` or an
    /// inconsistent one, [`TextError::UnknownPreTokenizer`] for a `pre` that is not known.
    pub fn from_vocab(spec: VocabSpec) -> Result<Self, TextError> {
        let kinds = kinds(&spec)?;
        let ids: Ids = (0..)
            .zip(&spec.tokens)
            .map(|(id, text)| (text.as_str(), id))
            .collect();
        let read = match spec.model.as_str() {
            "gpt2" => byte_level(&spec, kinds, &ids)?,
            "llama" => sentencepiece(&spec, kinds, &ids)?,
            other => {
                return Err(TextError::Vocab(format!(
                    "vocabularies of kind {other:?} (tokenizer.ggml.model) are not supported; \
                     \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE) are"
                )));
            }
        };
        let turn_ends = END_OF_TURN
            .iter()
            .filter_map(|&text| ids.get(text).copied());
        let turn_ends = turn_ends.filter(|&id| read.vocab.kind(id) == Kind::Control);
        let mut eos_ids: Vec<TokenId> = spec.eos.into_iter().chain(spec.eot).collect();
        eos_ids.extend(turn_ends);

        let whole = read.vocab.ids_of(Kind::Control);
        let whole = whole.chain(read.vocab.ids_of(Kind::UserDefined));
        let whole = whole.map(|id| WholeToken {
            id,
            text: spec.tokens[id as usize].clone(),
            lstrip: false,
            rstrip: spec.control_rstrip
                && read.vocab.kind(id) == Kind::Control
                && ![spec.bos, spec.eos].contains(&Some(id)),
        });
        let add_eos = spec.add_eos.unwrap_or(false);
        Tokenizer::new(Parts {
            whole: whole.collect(),
            prefix: spec.bos.filter(|_| read.add_bos).into_iter().collect(),
            suffix: spec.eos.filter(|_| add_eos).into_iter().collect(),
            bos: spec.bos,
            eos_ids,
            drops_leading_space: read.drops_leading_space,
            vocab: read.vocab,
            scheme: read.scheme,
        })
    }
}

/// What the kinds of vocabulary differ in.
struct Read {
    vocab: Vocab,
    scheme: Scheme,
    add_bos: bool,
    drops_leading_space: bool,
}

fn byte_level(spec: &VocabSpec, mut kinds: Vec<Kind>, ids: &Ids) -> Result<Read, TextError> {
    if spec.add_space_prefix == Some(true) {
        return Err(TextError::Vocab(
            "add_space_prefix is not supported for byte-level BPE".into(),
        ));
    }
    for kind in kinds.iter_mut().filter(|k| **k == Kind::Byte) {
        *kind = Kind::Normal;
    }
    let family = Family::named(spec.pre.as_deref().unwrap_or("default"))?;
    let vocab = Vocab::new(&spec.tokens, kinds, Writing::ByteLevel)?;
    let merges = spec.merges.iter().enumerate().map(|(rank, merge)| {
        merge.split_once(' ').ok_or_else(|| {
            TextError::Vocab(format!(
                "merge {rank} ({merge:?}): is not two tokens with a space between"
            ))
        })
    });
    let scheme = ByteLevel {
        bpe: Bpe::listed(merges, ids)?,
        pre: family.pre_tokenizer(),
        bytes: ByteTokens::new(ids, None),
        whole_words: family.ignore_merges.then(|| by_bytes(&vocab)),
        nfc: family.nfc,
        composed: WholeTokens::new(Vec::new())?,
    };
    Ok(Read {
        vocab,
        scheme: Scheme::ByteLevel(Box::new(scheme)),
        add_bos: spec.add_bos.unwrap_or(family.add_bos),
        drops_leading_space: false,
    })
}

fn sentencepiece(spec: &VocabSpec, kinds: Vec<Kind>, ids: &Ids) -> Result<Read, TextError> {
    if spec.scores.len() != spec.tokens.len() {
        return Err(TextError::Vocab(format!(
            "{} tokens but {} scores",
            spec.tokens.len(),
            spec.scores.len()
        )));
    }
    let bpe = Bpe::scored(&spec.tokens, &kinds, &spec.scores, ids)?;
    let vocab = Vocab::new(&spec.tokens, kinds, Writing::SentencePiece)?;
    let add_space_prefix = spec.add_space_prefix.unwrap_or(true);
    let prefix = add_space_prefix.then_some(SpacePrefix {
        at_start_only: false,
        unless_space: false,
    });
    Ok(Read {
        scheme: Scheme::SentencePiece(Box::new(SentencePiece::new(bpe, ids, &vocab, prefix)?)),
        vocab,
        add_bos: spec.add_bos.unwrap_or(true),
        drops_leading_space: add_space_prefix,
    })
}

/// The kinds of the tokens, as many as there are tokens.
fn kinds(spec: &VocabSpec) -> Result<Vec<Kind>, TextError> {
    if spec.token_types.is_empty() {
        return Ok(vec![Kind::Normal; spec.tokens.len()]);
    }
    if spec.token_types.len() != spec.tokens.len() {
        return Err(TextError::Vocab(format!(
            "{} tokens but {} token types",
            spec.tokens.len(),
            spec.token_types.len()
        )));
    }
    let kinds = spec.token_types.iter().map(|&t| Kind::from_gguf(t));
    kinds.collect()
}
