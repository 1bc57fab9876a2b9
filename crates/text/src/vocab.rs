use std::collections::HashMap;

use spate_types::TokenId;

use crate::TextError;

/// A vocabulary as a GGUF file states it (`tokenizer.ggml.*`).
#[derive(Debug, Clone, Default)]
pub struct VocabSpec {
    /// `tokenizer.ggml.model`: `"gpt2"` is byte-level BPE, the only one served.
    pub model: String,
    /// `tokenizer.ggml.pre`: names the pre-tokenizer; absent in old files, which means `"default"`.
    pub pre: Option<String>,
    /// Token texts by id; normal tokens are written in GPT-2's printable byte alphabet.
    pub tokens: Vec<String>,
    /// GGUF token types by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    /// Empty means all normal.
    pub token_types: Vec<i32>,
    /// Scores by id; unused by byte-level BPE.
    pub scores: Vec<f32>,
    /// Merges `"left right"`, the most urgent first.
    pub merges: Vec<String>,
    /// Begin of sequence.
    pub bos: Option<TokenId>,
    /// End of sequence.
    pub eos: Option<TokenId>,
    /// End of turn.
    pub eot: Option<TokenId>,
    /// Unknown token; unused by byte-level BPE.
    pub unk: Option<TokenId>,
    /// Whether prompts start with `bos`; `None`: what the pre-tokenizer's family does.
    pub add_bos: Option<bool>,
    /// Whether prompts end with `eos`; `None`: no.
    pub add_eos: Option<bool>,
    /// Whether a space is put before the text; byte-level BPE does not.
    pub add_space_prefix: Option<bool>,
}

/// How a token takes part in encoding and decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Made by merges.
    Normal,
    /// Structure, not text: matched whole where control tokens are allowed, left out of shown text.
    Control,
    /// Matched whole in any text, shown as text.
    UserDefined,
    /// Never made by encoding, left out of shown text: padding of the embedding table, unknown.
    Reserved,
}

impl Kind {
    fn from_gguf(token_type: i32) -> Result<Self, TextError> {
        match token_type {
            1 | 6 => Ok(Self::Normal),
            3 => Ok(Self::Control),
            4 => Ok(Self::UserDefined),
            2 | 5 => Ok(Self::Reserved),
            other => Err(TextError::Vocab(format!(
                "token type {other} is not one of GGUF's (1 to 6)"
            ))),
        }
    }
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
    pub(crate) fn new(spec: &VocabSpec) -> Result<Self, TextError> {
        let n = spec.tokens.len();
        if n == 0 {
            return Err(TextError::Vocab("the vocabulary is empty".into()));
        }
        if !spec.token_types.is_empty() && spec.token_types.len() != n {
            return Err(TextError::Vocab(format!(
                "{n} tokens but {} token types",
                spec.token_types.len()
            )));
        }
        let kinds: Vec<Kind> = if spec.token_types.is_empty() {
            vec![Kind::Normal; n]
        } else {
            let kinds = spec.token_types.iter().map(|&t| Kind::from_gguf(t));
            kinds.collect::<Result<_, _>>()?
        };
        let alphabet = ByteAlphabet::new();
        let mut bytes = Vec::with_capacity(spec.tokens.iter().map(String::len).sum());
        let mut ends = Vec::with_capacity(n);
        let mut max_token_bytes = 0;
        for (text, kind) in spec.tokens.iter().zip(&kinds) {
            let start = bytes.len();
            match kind {
                Kind::Normal => alphabet.decode(text, &mut bytes),
                _ => bytes.extend_from_slice(text.as_bytes()),
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

    #[test]
    fn refuses_inconsistent_vocabularies() {
        let spec = |tokens: &[&str], types: &[i32]| VocabSpec {
            tokens: tokens.iter().map(|t| t.to_string()).collect(),
            token_types: types.to_vec(),
            ..VocabSpec::default()
        };
        for (tokens, types) in [
            (&[][..], &[][..]),
            (&["a", "b"], &[1]),
            (&["a"], &[7]),
            (&["a"], &[-1]),
        ] {
            assert!(Vocab::new(&spec(tokens, types)).is_err());
        }
    }

    #[test]
    fn ids_outside_have_no_text() {
        let vocab = Vocab::new(&VocabSpec {
            tokens: vec!["Ġa".into(), "<x>".into()],
            token_types: vec![1, 3],
            ..VocabSpec::default()
        });
        let vocab = vocab.expect("valid");
        assert_eq!(vocab.bytes(0), b" a");
        assert_eq!(vocab.bytes(1), b"<x>");
        assert_eq!(vocab.bytes(2), b"");
        assert_eq!(vocab.kind(u32::MAX), Kind::Reserved);
        assert_eq!(vocab.max_token_bytes(), 3);
    }
}
