use std::borrow::Cow;

use spate_types::TokenId;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::bpe::{Bpe, Scratch};
use crate::pretokenizer::PreTokenizer;
use crate::vocab::{ByteAlphabet, Ids, Kind, Vocab};
use crate::whole::WholeTokens;

/// Byte-level byte-pair encoding (Radford et al. 2019): text is split into words, each of which is
/// merged from its bytes.
pub(crate) struct ByteLevel {
    pub(crate) bpe: Bpe,
    pub(crate) pre: PreTokenizer,
    pub(crate) bytes: ByteTokens,
    /// Ids of normal tokens sorted by their bytes, when a word that is a token skips the merges.
    pub(crate) whole_words: Option<Vec<TokenId>>,
    /// Text is composed first (Unicode normalization form C).
    pub(crate) nfc: bool,
    /// Tokens that are looked for after composing.
    pub(crate) composed: WholeTokens,
}

impl ByteLevel {
    /// Appends the tokens of `text`, which is shorter than 2^32 bytes.
    pub(crate) fn encode(
        &self,
        text: &str,
        vocab: &Vocab,
        scratch: &mut Scratch,
        out: &mut Vec<TokenId>,
    ) {
        let text = match self.nfc {
            true => compose(text),
            false => Cow::Borrowed(text),
        };
        let mut at = 0;
        for m in self.composed.find(&text, 0..text.len()) {
            self.encode_words(&text[at..m.start], vocab, scratch, out);
            out.push(m.id);
            at = m.end;
        }
        self.encode_words(&text[at..], vocab, scratch, out);
    }

    fn encode_words(
        &self,
        text: &str,
        vocab: &Vocab,
        scratch: &mut Scratch,
        out: &mut Vec<TokenId>,
    ) {
        self.pre.split(text, &mut |word| {
            let word = word.as_bytes();
            if let Some(words) = &self.whole_words
                && let Ok(i) = words.binary_search_by_key(&word, |&id| vocab.bytes(id))
            {
                return out.push(words[i]);
            }
            self.bpe.encode_word(self.bytes.of(word), scratch, out);
        });
    }
}

/// Ids of normal tokens sorted by their bytes.
pub(crate) fn by_bytes(vocab: &Vocab) -> Vec<TokenId> {
    let mut words: Vec<TokenId> = vocab.ids_of(Kind::Normal).collect();
    words.sort_unstable_by_key(|&id| vocab.bytes(id));
    words
}

fn compose(text: &str) -> Cow<'_, str> {
    match is_nfc_quick(text.chars()) {
        IsNormalized::Yes => Cow::Borrowed(text),
        _ => Cow::Owned(text.nfc().collect()),
    }
}

/// The tokens that single bytes start as.
pub(crate) struct ByteTokens {
    tokens: [Option<TokenId>; 256],
    /// For bytes without a token, and whether a run of them is one token. Without it they are left
    /// out, as `tokenizers` and llama.cpp do (they are control characters and unassigned planes in
    /// practice).
    unknown: Option<(TokenId, bool)>,
}

impl ByteTokens {
    pub(crate) fn new(ids: &Ids, unknown: Option<(TokenId, bool)>) -> Self {
        let mut tokens = [None; 256];
        for (byte, token) in (0..=255).zip(&mut tokens) {
            let text = ByteAlphabet::char_of(byte);
            *token = ids.get(text.encode_utf8(&mut [0; 4]) as &str).copied();
        }
        Self { tokens, unknown }
    }

    fn of(&self, word: &[u8]) -> impl Iterator<Item = TokenId> {
        let mut in_unknown = false;
        word.iter().filter_map(move |&byte| {
            let token = self.tokens[usize::from(byte)];
            let goes_on = std::mem::replace(&mut in_unknown, token.is_none());
            token.or_else(|| {
                let (unknown, fused) = self.unknown?;
                (!(fused && goes_on)).then_some(unknown)
            })
        })
    }
}
