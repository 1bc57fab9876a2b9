use std::ops::Range;

use spate_types::TokenId;

use crate::bpe::Scratch;
use crate::byte_level::ByteLevel;
use crate::detokenizer::push_lossy;
use crate::guard::Rendered;
use crate::sentencepiece::SentencePiece;
use crate::vocab::{Kind, Vocab};
use crate::whole::{Found, WholeToken, WholeTokens};
use crate::{TextError, guard};

/// Tokenizer of one model. Immutable: share it in an `Arc`.
pub struct Tokenizer {
    vocab: Vocab,
    scheme: Scheme,
    control: WholeTokens,
    /// The control tokens that [`Self::encode_rendered`] may recognise.
    guarded: WholeTokens,
    user_defined: WholeTokens,
    prefix: Vec<TokenId>,
    suffix: Vec<TokenId>,
    bos: Option<TokenId>,
    eos_ids: Vec<TokenId>,
    bos_text: String,
    eos_text: String,
    drops_leading_space: bool,
}

/// What a tokenizer is made of, whichever file describes it.
pub(crate) struct Parts {
    pub(crate) vocab: Vocab,
    pub(crate) scheme: Scheme,
    /// Control and user-defined tokens.
    pub(crate) whole: Vec<WholeToken>,
    /// Tokens before a prompt.
    pub(crate) prefix: Vec<TokenId>,
    /// Tokens after a prompt.
    pub(crate) suffix: Vec<TokenId>,
    pub(crate) bos: Option<TokenId>,
    /// The end of sequence first; may name a token twice.
    pub(crate) eos_ids: Vec<TokenId>,
    /// Decoding takes off the space that encoding puts before a text.
    pub(crate) drops_leading_space: bool,
}

/// How text between control tokens is encoded.
pub(crate) enum Scheme {
    ByteLevel(Box<ByteLevel>),
    SentencePiece(Box<SentencePiece>),
}

impl Tokenizer {
    /// Puts the parts together.
    pub(crate) fn new(parts: Parts) -> Result<Self, TextError> {
        let Parts {
            vocab, whole, bos, ..
        } = parts;
        let own = [&parts.prefix, &parts.suffix].into_iter().flatten();
        for (name, id) in bos
            .iter()
            .map(|id| ("bos", id))
            .chain(parts.eos_ids.iter().map(|id| ("eos", id)))
            .chain(own.map(|id| ("bos or eos", id)))
        {
            if *id as usize >= vocab.len() {
                return Err(TextError::Vocab(format!(
                    "the {name} token is {id}, but there are {} tokens",
                    vocab.len()
                )));
            }
        }
        let text_of = |id: Option<TokenId>| id.map_or(String::new(), |id| vocab.text(id).into());
        let eos_text = text_of(parts.eos_ids.first().copied());
        let mut eos_ids = Vec::new();
        add_distinct(&mut eos_ids, parts.eos_ids);
        let (control, user_defined): (Vec<_>, Vec<_>) = whole
            .into_iter()
            .partition(|t| vocab.kind(t.id) == Kind::Control);
        let guarded = control.iter().filter(|t| guard::is_guardable(&t.text));
        Ok(Self {
            guarded: WholeTokens::new(guarded.cloned().collect())?,
            control: WholeTokens::new(control)?,
            user_defined: WholeTokens::new(user_defined)?,
            scheme: parts.scheme,
            prefix: parts.prefix,
            suffix: parts.suffix,
            bos_text: text_of(bos),
            bos,
            eos_ids,
            eos_text,
            drops_leading_space: parts.drops_leading_space,
            vocab,
        })
    }

    /// Adds tokens with which the model ends its output, as a `generation_config.json` lists them.
    ///
    /// # Errors
    /// [`TextError::Vocab`] for an id outside the vocabulary.
    pub fn with_eos_ids(mut self, ids: &[TokenId]) -> Result<Self, TextError> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab.len()) {
            return Err(TextError::Vocab(format!(
                "the eos token is {id}, but there are {} tokens",
                self.vocab.len()
            )));
        }
        add_distinct(&mut self.eos_ids, ids.to_vec());
        if self.eos_text.is_empty() {
            self.eos_text = ids
                .first()
                .map_or(String::new(), |&id| self.vocab.text(id).into());
        }
        Ok(self)
    }

    /// The tokens of `text`.
    ///
    /// `add_special_tokens` puts the tokens before and after that the model wants there, as a rule
    /// its `bos` before. `parse_special` lets the text of a control token become that token; without it such
    /// text is encoded like any other.
    ///
    /// # Errors
    /// [`TextError::TooLong`] for texts of 4 GiB and more.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        parse_special: bool,
    ) -> Result<Vec<TokenId>, TextError> {
        let mut out = Output::new(text)?;
        if add_special_tokens {
            out.tokens.extend(&self.prefix);
        }
        if parse_special {
            let matches = self.control.find(text, 0..text.len());
            self.encode_between(text, matches, &mut out);
        } else {
            self.encode_text(text, 0..text.len(), &mut out);
        }
        if add_special_tokens {
            out.tokens.extend(&self.suffix);
        }
        Ok(out.tokens)
    }

    /// The tokens of a rendered chat. Control tokens are recognised where the template began them,
    /// never where the client's text did.
    ///
    /// `add_special_tokens` puts before it what the model wants before a text, unless the template
    /// wrote that itself, as most do. Nothing is put after it: the answer comes there.
    ///
    /// # Errors
    /// [`TextError::TooLong`] for texts of 4 GiB and more.
    pub fn encode_rendered(
        &self,
        rendered: &Rendered,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, TextError> {
        let text = rendered.text.as_str();
        let mut out = Output::new(text)?;
        let matches = rendered
            .unbroken()
            .flat_map(|range| self.guarded.find(text, range))
            .collect();
        self.encode_between(text, matches, &mut out);
        if add_special_tokens && !out.tokens.starts_with(&self.prefix) {
            out.tokens.splice(0..0, self.prefix.iter().copied());
        }
        Ok(out.tokens)
    }

    /// Encodes the text between the given tokens, which do not overlap.
    fn encode_between(&self, text: &str, matches: Vec<Found>, out: &mut Output) {
        let mut at = 0;
        for m in matches {
            self.encode_text(text, at..m.start, out);
            out.tokens.push(m.id);
            at = m.end;
        }
        self.encode_text(text, at..text.len(), out);
    }

    /// Encodes `text[range]`, which holds no control token.
    fn encode_text(&self, text: &str, range: Range<usize>, out: &mut Output) {
        let mut at = range.start;
        for m in self.user_defined.find(text, range.clone()) {
            self.encode_merged(text, at..m.start, out);
            out.tokens.push(m.id);
            at = m.end;
        }
        self.encode_merged(text, at..range.end, out);
    }

    /// Encodes `text[range]`, which holds no token that is matched whole.
    fn encode_merged(&self, text: &str, range: Range<usize>, out: &mut Output) {
        let Output { tokens, scratch } = out;
        let at_start = range.start == 0;
        let text = &text[range];
        match &self.scheme {
            Scheme::ByteLevel(scheme) => scheme.encode(text, &self.vocab, scratch, tokens),
            Scheme::SentencePiece(scheme) => scheme.encode(text, at_start, scratch, tokens),
        }
    }

    /// The text of the tokens; bytes that are not UTF-8 become U+FFFD. `skip_special_tokens` leaves
    /// out the tokens for which [`Self::is_special`] holds. Ids outside the vocabulary have no text.
    ///
    /// The tokens are a whole text: the space that some tokenizers put before one is taken off.
    pub fn decode(&self, ids: &[TokenId], skip_special_tokens: bool) -> String {
        let shown = ids
            .iter()
            .filter(|&&id| !(skip_special_tokens && self.is_special(id)));
        let mut bytes: Vec<u8> = shown
            .flat_map(|&id| self.token_bytes(id))
            .copied()
            .collect();
        if self.drops_leading_space && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
        let mut text = String::with_capacity(bytes.len());
        push_lossy(&mut bytes, &mut text);
        text.push_str(&String::from_utf8_lossy(&bytes));
        text
    }

    /// Whether a whole text begins with a space of the tokenizer's own.
    pub(crate) fn drops_leading_space(&self) -> bool {
        self.drops_leading_space
    }

    /// The bytes that a token stands for: of a control token its text, of an id outside the
    /// vocabulary none. They need not be UTF-8 by themselves.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.vocab.bytes(id)
    }

    /// Whether the token is structure and not text: control, unknown or unused in GGUF's terms, or
    /// outside the vocabulary.
    pub fn is_special(&self, id: TokenId) -> bool {
        matches!(self.vocab.kind(id), Kind::Control | Kind::Reserved)
    }

    /// Number of tokens; ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Bytes of the longest token. A text of `n` bytes has at least `n / max_token_bytes` tokens
    /// (but for bytes the vocabulary lacks), which lets a server refuse a hopeless prompt unread.
    pub fn max_token_bytes(&self) -> usize {
        self.vocab.max_token_bytes()
    }

    /// The begin-of-sequence token.
    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    /// The tokens with which the model ends its output: end of sequence, end of turn.
    pub fn eos_ids(&self) -> &[TokenId] {
        &self.eos_ids
    }

    /// Text of the begin-of-sequence token, empty if there is none.
    pub fn bos_text(&self) -> &str {
        &self.bos_text
    }

    /// Text of the end-of-sequence token, empty if there is none.
    pub fn eos_text(&self) -> &str {
        &self.eos_text
    }

    /// Texts of the control tokens that [`Self::encode_rendered`] may recognise.
    pub(crate) fn guarded_texts(&self) -> impl Iterator<Item = String> + '_ {
        self.guarded.texts().map(str::to_owned)
    }
}

/// Appends those that are not there yet.
fn add_distinct(ids: &mut Vec<TokenId>, more: Vec<TokenId>) {
    for id in more {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
}

/// What an encoding has made so far.
struct Output {
    tokens: Vec<TokenId>,
    scratch: Scratch,
}

impl Output {
    /// For a text whose positions fit in 32 bits.
    fn new(text: &str) -> Result<Self, TextError> {
        if u32::try_from(text.len()).is_err() {
            return Err(TextError::TooLong(text.len()));
        }
        Ok(Self {
            tokens: Vec::with_capacity(text.len() / 4 + 2),
            scratch: Scratch::default(),
        })
    }
}
