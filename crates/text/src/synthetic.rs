use crate::vocab::ByteAlphabet;
use crate::{TextError, Tokenizer, VocabSpec};

impl Tokenizer {
    /// A tokenizer for a model of random weights that has none: token `b < 256` is the byte `b`,
    /// the others are words that encoding never makes. Any text survives the way there and back.
    ///
    /// # Errors
    /// [`TextError::Vocab`] for fewer than 256 tokens.
    pub fn synthetic(vocab_size: usize) -> Result<Self, TextError> {
        if vocab_size < 256 {
            return Err(TextError::Vocab(format!(
                "a synthetic tokenizer needs at least 256 tokens, the model has {vocab_size}"
            )));
        }
        let bytes = (0..=255).map(|b| ByteAlphabet::char_of(b).to_string());
        let words = (256..vocab_size).map(|id| format!("Ġt{id}"));
        Self::from_vocab(VocabSpec {
            model: "gpt2".into(),
            pre: Some("gpt-2".into()),
            tokens: bytes.chain(words).collect(),
            ..VocabSpec::default()
        })
    }
}
