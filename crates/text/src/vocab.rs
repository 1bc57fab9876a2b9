use std::collections::HashMap;

use spate_types::TokenId;

use crate::TextError;
use crate::hash::FileHashMap;

/// Token ids by text.
pub(crate) type Ids<'t> = FileHashMap<&'t str, TokenId>;

/// What SentencePiece writes for a space.
pub(crate) const META_SPACE: char = '▁';

/// How a token takes part in encoding and decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Made by merges.
    Normal,
    /// `<0xNN>`: one byte of a character that has no token.
    Byte,
    /// Structure, not text: matched whole where control tokens are allowed, left out of shown text.
    Control,
    /// Matched whole in any text, shown as text.
    UserDefined,
    /// Never made by encoding, left out of shown text: padding of the embedding table, unknown.
    Reserved,
}

/// How the texts of tokens are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writing {
    /// Normal tokens in GPT-2's printable byte alphabet.
    ByteLevel,
    /// All with [`META_SPACE`] for a space.
    SentencePiece,
}

/// The tokens' bytes in one allocation, by id.
pub(crate) struct Vocab {
    bytes: Vec<u8>,
    /// Token `i` is `bytes[ends[i - 1] .. ends[i]]`.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    max_token_bytes: usize,
}

impl Vocab {
    /// `tokens` and `kinds` are of equal length.
    pub(crate) fn new(
        tokens: &[String],
        kinds: Vec<Kind>,
        writing: Writing,
    ) -> Result<Self, TextError> {
        if tokens.is_empty() {
            return Err(TextError::Vocab("the vocabulary is empty".into()));
        }
        let alphabet = ByteAlphabet::new();
        let mut bytes = Vec::with_capacity(tokens.iter().map(String::len).sum());
        let mut ends = Vec::with_capacity(tokens.len());
        let mut max_token_bytes = 0;
        for (text, kind) in tokens.iter().zip(&kinds) {
            let start = bytes.len();
            match (kind, writing) {
                (Kind::Byte, _) => bytes.push(byte_of(text)?),
                (Kind::Control | Kind::Reserved, _) | (Kind::UserDefined, Writing::ByteLevel) => {
                    bytes.extend_from_slice(text.as_bytes());
                }
                (Kind::Normal, Writing::ByteLevel) => alphabet.decode(text, &mut bytes),
                (Kind::Normal | Kind::UserDefined, Writing::SentencePiece) => {
                    bytes.extend_from_slice(text.replace(META_SPACE, " ").as_bytes());
                }
            }
            max_token_bytes = max_token_bytes.max(bytes.len() - start);
            let end = u32::try_from(bytes.len())
                .map_err(|_| TextError::Vocab("the tokens hold more than 4 GiB".into()))?;
            ends.push(end);
        }
        Ok(Self {
            bytes,
            ends,
            kinds,
            max_token_bytes,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn max_token_bytes(&self) -> usize {
        self.max_token_bytes
    }

    /// The bytes of a token; none for an id outside the vocabulary.
    pub(crate) fn bytes(&self, id: TokenId) -> &[u8] {
        let i = id as usize;
        let Some(&end) = self.ends.get(i) else {
            return &[];
        };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// An id outside the vocabulary is reserved: no text, never shown.
    pub(crate) fn kind(&self, id: TokenId) -> Kind {
        self.kinds
            .get(id as usize)
            .copied()
            .unwrap_or(Kind::Reserved)
    }

    /// Ids of one kind, ascending, whose text is not empty.
    pub(crate) fn ids_of(&self, kind: Kind) -> impl Iterator<Item = TokenId> + '_ {
        (0..self.len() as TokenId)
            .filter(move |&id| self.kind(id) == kind && !self.bytes(id).is_empty())
    }

    /// The text of a token that is stored as text (any but a normal one); lossy otherwise.
    pub(crate) fn text(&self, id: TokenId) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(self.bytes(id))
    }
}

/// The byte that a byte token's text `<0xNN>` stands for.
fn byte_of(text: &str) -> Result<u8, TextError> {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits
        .filter(|d| d.len() == 2)
        .filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))
        .and_then(|d| u8::from_str_radix(d, 16).ok())
        .ok_or_else(|| TextError::Vocab(format!("byte token {text:?} is not like <0x0A>")))
}

/// GPT-2's reversible map between bytes and printable characters (Radford et al. 2019, `encoder.py`):
/// printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up, in byte order.
pub(crate) struct ByteAlphabet {
    bytes: HashMap<char, u8>,
}

impl ByteAlphabet {
    pub(crate) fn new() -> Self {
        let bytes = (0..=255).map(|b| (Self::char_of(b), b)).collect();
        Self { bytes }
    }

    /// The character that stands for a byte.
    pub(crate) fn char_of(byte: u8) -> char {
        let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        if printable(byte) {
            return char::from(byte);
        }
        let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
        char::from_u32(0x100 + rank).expect("U+0100 to U+0143 are characters")
    }

    /// Appends the bytes that `text` stands for. A character outside the alphabet stands for its
    /// own UTF-8, as in tokens that were added to a vocabulary by hand.
    fn decode(&self, text: &str, out: &mut Vec<u8>) {
        for c in text.chars() {
            // Most characters: spares the hash.
            if c.is_ascii_graphic() {
                out.push(c as u8);
            } else if let Some(&b) = self.bytes.get(&c) {
                out.push(b);
            } else {
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_has_a_distinct_printable_character_for_each_byte() {
        let alphabet = ByteAlphabet::new();
        assert_eq!(alphabet.bytes.len(), 256);
        assert_eq!(ByteAlphabet::char_of(b' '), 'Ġ');
        assert_eq!(ByteAlphabet::char_of(b'\n'), 'Ċ');
        let all: String = (0..=255).map(ByteAlphabet::char_of).collect();
        let mut out = Vec::new();
        alphabet.decode(&all, &mut out);
        assert_eq!(out, (0..=255).collect::<Vec<u8>>());
    }

    fn vocab(tokens: &[&str], kinds: &[Kind], writing: Writing) -> Result<Vocab, TextError> {
        let tokens: Vec<String> = tokens.iter().map(|t| t.to_string()).collect();
        Vocab::new(&tokens, kinds.to_vec(), writing)
    }

    #[test]
    fn texts_as_each_writing_has_them() {
        let tokens = ["Ġa▁", "▁a", "<0x0A>", "▁▁", "<▁x>"];
        let kinds = [
            Kind::Normal,
            Kind::Normal,
            Kind::Byte,
            Kind::UserDefined,
            Kind::Control,
        ];
        let bytes = |writing| {
            let vocab = vocab(&tokens, &kinds, writing).expect("valid");
            (0..5).map(|id| vocab.text(id).into_owned()).collect()
        };
        let texts: Vec<String> = bytes(Writing::ByteLevel);
        assert_eq!(texts, [" a▁", "▁a", "\n", "▁▁", "<▁x>"]);
        let texts: Vec<String> = bytes(Writing::SentencePiece);
        assert_eq!(texts, ["Ġa ", " a", "\n", "  ", "<▁x>"]);
    }

    #[test]
    fn refuses_bytes_that_are_none() {
        for text in ["a", "<0x0>", "<0x+1>", "<0x100>", "<0xGG>"] {
            assert!(
                vocab(&[text], &[Kind::Byte], Writing::SentencePiece).is_err(),
                "{text}"
            );
        }
        assert!(vocab(&[], &[], Writing::ByteLevel).is_err());
    }

    #[test]
    fn ids_outside_have_no_text() {
        let kinds = [Kind::Normal, Kind::Control];
        let vocab = vocab(&["Ġa", "<x>"], &kinds, Writing::ByteLevel).expect("valid");
        assert_eq!(vocab.bytes(0), b" a");
        assert_eq!(vocab.bytes(1), b"<x>");
        assert_eq!(vocab.bytes(2), b"");
        assert_eq!(vocab.kind(u32::MAX), Kind::Reserved);
        assert_eq!(vocab.max_token_bytes(), 3);
    }
}
