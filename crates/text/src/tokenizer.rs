use aho_corasick::{AhoCorasick, MatchKind};
use spate_types::TokenId;

use crate::bpe::{Bpe, Scratch};
use crate::detokenizer::push_lossy;
use crate::guard::Rendered;
use crate::pretokenizer::PreTokenizer;
use crate::vocab::{Kind, Vocab, VocabSpec};
use crate::{TextError, guard};

/// Byte-level BPE tokenizer of one model. Immutable: share it in an `Arc`.
pub struct Tokenizer {
    vocab: Vocab,
    pre: PreTokenizer,
    bpe: Bpe,
    control: WholeTokens,
    /// The control tokens that [`Self::encode_rendered`] may recognise.
    guarded: WholeTokens,
    user_defined: WholeTokens,
    bos: Option<TokenId>,
    eos_ids: Vec<TokenId>,
    bos_text: String,
    eos_text: String,
    add_bos: bool,
    add_eos: bool,
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF vocabulary.
    ///
    /// # Errors
    /// [`TextError::Vocab`] for a kind of vocabulary other than `"gpt2"` or an inconsistent one,
    /// [`TextError::UnknownPreTokenizer`] for a `pre` that is not known.
    pub fn from_vocab(spec: VocabSpec) -> Result<Self, TextError> {
        if spec.model != "gpt2" {
            return Err(TextError::Vocab(format!(
                "vocabularies of kind {:?} (tokenizer.ggml.model) are not supported; \"gpt2\" \
                 (byte-level BPE) is",
                spec.model
            )));
        }
        if spec.add_space_prefix == Some(true) {
            return Err(TextError::Vocab(
                "add_space_prefix is not supported for byte-level BPE".into(),
            ));
        }
        let vocab = Vocab::new(&spec)?;
        let named = |name: &str, id: Option<TokenId>| match id {
            Some(id) if id as usize >= vocab.len() => Err(TextError::Vocab(format!(
                "the {name} token is {id}, but there are {} tokens",
                vocab.len()
            ))),
            id => Ok(id),
        };
        let bos = named("bos", spec.bos)?;
        let eos = named("eos", spec.eos)?;
        let eot = named("eot", spec.eot)?;
        let mut eos_ids: Vec<TokenId> = eos.into_iter().chain(eot).collect();
        eos_ids.dedup();
        let text_of = |id: Option<TokenId>| id.map_or(String::new(), |id| vocab.text(id).into());
        let (bos_text, eos_text) = (text_of(bos), text_of(eos));

        let pre = PreTokenizer::named(spec.pre.as_deref().unwrap_or("default"))?;
        let add_bos = spec.add_bos.unwrap_or(pre.add_bos) && bos.is_some();
        let add_eos = spec.add_eos.unwrap_or(false) && eos.is_some();
        let bpe = Bpe::new(&spec, &vocab, pre.ignore_merges)?;
        let guardable = |&id: &TokenId| guard::is_guardable(&vocab.text(id));
        let control = WholeTokens::new(&vocab, vocab.ids_of(Kind::Control).collect())?;
        let guarded = vocab.ids_of(Kind::Control).filter(guardable).collect();
        let guarded = WholeTokens::new(&vocab, guarded)?;
        let user_defined = WholeTokens::new(&vocab, vocab.ids_of(Kind::UserDefined).collect())?;
        Ok(Self {
            vocab,
            pre,
            bpe,
            control,
            guarded,
            user_defined,
            bos,
            eos_ids,
            bos_text,
            eos_text,
            add_bos,
            add_eos,
        })
    }

    /// The tokens of `text`.
    ///
    /// `add_special_tokens` puts the model's `bos` before and `eos` after, where the model wants
    /// them. `parse_special` lets the text of a control token become that token; without it such
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
        if add_special_tokens && self.add_bos {
            out.tokens.extend(self.bos);
        }
        if parse_special {
            let matches = self.control.find(text, 0..text.len()).collect();
            self.encode_between(text, matches, &mut out);
        } else {
            self.encode_text(text, &mut out);
        }
        if add_special_tokens && self.add_eos {
            out.tokens.extend(self.eos_ids.first());
        }
        Ok(out.tokens)
    }

    /// The tokens of a rendered chat. Control tokens are recognised where the template began them,
    /// never where the client's text did; no `bos` is added, for the template writes its own.
    ///
    /// # Errors
    /// [`TextError::TooLong`] for texts of 4 GiB and more.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<TokenId>, TextError> {
        let text = rendered.text.as_str();
        let mut out = Output::new(text)?;
        let matches = rendered
            .unbroken()
            .flat_map(|range| self.guarded.find(text, range))
            .collect();
        self.encode_between(text, matches, &mut out);
        Ok(out.tokens)
    }

    /// Encodes the text between the given tokens, which do not overlap.
    fn encode_between(&self, text: &str, matches: Vec<WholeToken>, out: &mut Output) {
        let mut at = 0;
        for m in matches {
            self.encode_text(&text[at..m.start], out);
            out.tokens.push(m.id);
            at = m.end;
        }
        self.encode_text(&text[at..], out);
    }

    /// Encodes text that holds no control token.
    fn encode_text(&self, text: &str, out: &mut Output) {
        let mut at = 0;
        for m in self.user_defined.find(text, 0..text.len()) {
            self.encode_words(&text[at..m.start], out);
            out.tokens.push(m.id);
            at = m.end;
        }
        self.encode_words(&text[at..], out);
    }

    fn encode_words(&self, text: &str, out: &mut Output) {
        let Output { tokens, scratch } = out;
        self.pre.split(text, &mut |word| {
            self.bpe
                .encode_word(word.as_bytes(), &self.vocab, scratch, tokens);
        });
    }

    /// The text of the tokens; bytes that are not UTF-8 become U+FFFD. `skip_special_tokens` leaves
    /// out the tokens for which [`Self::is_special`] holds. Ids outside the vocabulary have no text.
    pub fn decode(&self, ids: &[TokenId], skip_special_tokens: bool) -> String {
        let shown = ids
            .iter()
            .filter(|&&id| !(skip_special_tokens && self.is_special(id)));
        let mut bytes: Vec<u8> = shown
            .flat_map(|&id| self.token_bytes(id))
            .copied()
            .collect();
        let mut text = String::with_capacity(bytes.len());
        push_lossy(&mut bytes, &mut text);
        text.push_str(&String::from_utf8_lossy(&bytes));
        text
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
        let ids = self.guarded.ids.iter();
        ids.map(|&id| self.vocab.text(id).into_owned())
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

/// Finds tokens that are matched whole: at each place the longest, from left to right.
struct WholeTokens {
    matcher: AhoCorasick,
    /// By the matcher's pattern number.
    ids: Vec<TokenId>,
}

/// A token found at `start .. end`.
struct WholeToken {
    start: usize,
    end: usize,
    id: TokenId,
}

impl WholeTokens {
    fn new(vocab: &Vocab, ids: Vec<TokenId>) -> Result<Self, TextError> {
        let matcher = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(ids.iter().map(|&id| vocab.bytes(id)))
            .map_err(|e| TextError::Vocab(format!("too many control tokens: {e}")))?;
        Ok(Self { matcher, ids })
    }

    /// The tokens in `text[range]`, positions relative to `text`.
    fn find(
        &self,
        text: &str,
        range: std::ops::Range<usize>,
    ) -> impl Iterator<Item = WholeToken> + '_ {
        let offset = range.start;
        let found: Vec<_> = self.matcher.find_iter(&text[range]).collect();
        found.into_iter().map(move |m| WholeToken {
            start: offset + m.start(),
            end: offset + m.end(),
            id: self.ids[m.pattern().as_usize()],
        })
    }
}
