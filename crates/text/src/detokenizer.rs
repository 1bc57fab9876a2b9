use std::sync::Arc;

use spate_types::TokenId;

use crate::Tokenizer;

/// Turns one sequence's tokens into text as they come.
///
/// Token boundaries need not be character boundaries: bytes wait until their character is whole.
/// The texts of all pushes and the flush, joined, are the text of all ids.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// The start of a character, at most three bytes between pushes.
    pending: Vec<u8>,
    /// The next byte, if a space, is the one that encoding puts before a text.
    drops_space: bool,
}

impl Detokenizer {
    /// For tokens that go on with a text, as a model's output goes on with its prompt: a space at
    /// their beginning separates words.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer,
            skip_special_tokens,
            pending: Vec::new(),
            drops_space: false,
        }
    }

    /// For tokens that are a whole text: all pushes and the flush together give what
    /// [`Tokenizer::decode`] gives.
    pub fn at_start(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        Self {
            drops_space: tokenizer.drops_leading_space(),
            ..Self::new(tokenizer, skip_special_tokens)
        }
    }

    /// The text that became complete with this token; may be empty, never half a character.
    pub fn push(&mut self, id: TokenId) -> String {
        let mut text = String::new();
        if !(self.skip_special_tokens && self.tokenizer.is_special(id)) {
            let mut bytes = self.tokenizer.token_bytes(id);
            if self.drops_space && !bytes.is_empty() {
                self.drops_space = false;
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
            self.pending.extend_from_slice(bytes);
            push_lossy(&mut self.pending, &mut text);
        }
        text
    }

    /// The end of the sequence: an unfinished character becomes U+FFFD.
    pub fn flush(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Moves what is decided from `bytes` to `text`, U+FFFD for each ill-formed part as
/// [`String::from_utf8_lossy`] has it, and leaves the start of an unfinished character.
pub(crate) fn push_lossy(bytes: &mut Vec<u8>, text: &mut String) {
    let mut at = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        at += chunk.valid().len();
        let invalid = chunk.invalid();
        if at + invalid.len() == bytes.len() && is_unfinished(invalid) {
            break;
        }
        if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
        at += invalid.len();
    }
    bytes.drain(..at);
}

/// Whether more bytes could make a character of these.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}
