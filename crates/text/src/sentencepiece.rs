use std::collections::HashMap;

use spate_types::TokenId;

use crate::TextError;
use crate::bpe::{Bpe, Scratch};
use crate::vocab::{Ids, Kind, META_SPACE, Vocab};

/// Byte-pair encoding as SentencePiece does it (Kudo and Richardson 2018): text is merged from its
/// characters, a space being the character `▁`. A character that has no token is spelt in byte
/// tokens.
pub(crate) struct SentencePiece {
    bpe: Bpe,
    chars: HashMap<char, TokenId>,
    bytes: [TokenId; 256],
    prefix: Option<SpacePrefix>,
    /// No merge joins a token before a space with one that begins with a space, so text can be cut
    /// there: the tokens are the same, and short words merge faster than long texts.
    splits_at_spaces: bool,
}

/// When a space goes before the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpacePrefix {
    /// Before the first text only, not after each control token.
    pub(crate) at_start_only: bool,
    /// Not before text that begins with a space.
    pub(crate) unless_space: bool,
}

impl SentencePiece {
    pub(crate) fn new(
        bpe: Bpe,
        ids: &Ids,
        vocab: &Vocab,
        prefix: Option<SpacePrefix>,
    ) -> Result<Self, TextError> {
        let mut bytes = [0; 256];
        for (byte, token) in (0..=255u8).zip(&mut bytes) {
            let text = format!("<0x{byte:02X}>");
            *token = *ids.get(text.as_str()).ok_or_else(|| {
                TextError::Vocab(format!(
                    "the byte token {text} is missing; only vocabularies with all 256 are supported"
                ))
            })?;
        }
        let single = |(text, &id): (&&str, _)| {
            let mut chars = text.chars();
            let c = chars.next()?;
            let is_text = matches!(vocab.kind(id), Kind::Normal | Kind::UserDefined);
            (is_text && chars.next().is_none()).then_some((c, id))
        };
        let begins = |id| vocab.bytes(id).starts_with(b" ");
        let all_spaces = |id| vocab.bytes(id).iter().all(|&b| b == b' ');
        let splits_at_spaces = bpe
            .pairs()
            .all(|(left, right)| !begins(right) || all_spaces(left));
        Ok(Self {
            bpe,
            chars: ids.iter().filter_map(single).collect(),
            bytes,
            prefix,
            splits_at_spaces,
        })
    }

    /// Appends the tokens of `text`, which is shorter than 2^32 bytes. `at_start`: nothing comes
    /// before it.
    pub(crate) fn encode(
        &self,
        text: &str,
        at_start: bool,
        scratch: &mut Scratch,
        out: &mut Vec<TokenId>,
    ) {
        if text.is_empty() {
            return;
        }
        let mut space = self.prefix.is_some_and(|p| {
            (at_start || !p.at_start_only) && !(p.unless_space && text.starts_with(is_space))
        });
        let mut rest = text;
        while !rest.is_empty() {
            // A leading space joins the spaces that follow it.
            let end = match self.splits_at_spaces {
                true => word_end(rest),
                false => rest.len(),
            };
            let (word, after) = rest.split_at(end);
            let prefix = std::mem::take(&mut space).then_some(META_SPACE);
            let tokens = prefix.into_iter().chain(word.chars());
            self.bpe
                .encode_word(tokens.flat_map(|c| self.start(c)), scratch, out);
            rest = after;
        }
    }

    /// The tokens that a character starts as.
    fn start(&self, c: char) -> impl Iterator<Item = TokenId> + '_ {
        let c = if c == ' ' { META_SPACE } else { c };
        let token = self.chars.get(&c).copied();
        let mut buffer = [0; 4];
        let spelt = match token {
            Some(_) => 0,
            None => c.encode_utf8(&mut buffer).len(),
        };
        let bytes = buffer.into_iter().take(spelt);
        token
            .into_iter()
            .chain(bytes.map(|b| self.bytes[usize::from(b)]))
    }
}

fn is_space(c: char) -> bool {
    c == ' ' || c == META_SPACE
}

/// The end of the spaces and then non-spaces that `text` begins with.
fn word_end(text: &str) -> usize {
    let spaces = text.find(|c| !is_space(c)).unwrap_or(text.len());
    let word = text[spaces..].find(is_space);
    word.map_or(text.len(), |len| spaces + len)
}
