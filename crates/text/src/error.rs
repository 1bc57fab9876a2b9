/// What can go wrong between text and tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// The model's vocabulary cannot be used.
    #[error("tokenizer: {0}")]
    Vocab(String),
    /// The pre-tokenizer that the model names is not known: its text would be split wrongly.
    #[error("tokenizer: unknown pre-tokenizer {name:?} (tokenizer.ggml.pre); known are: {known}")]
    UnknownPreTokenizer {
        /// What the model asks for.
        name: String,
        /// What there is, comma-separated.
        known: String,
    },
    /// A file of the model's tokenizer can't be used; the problem names the field.
    #[error("{file}: {problem}")]
    File {
        /// Its usual name.
        file: &'static str,
        /// What is wrong, where.
        problem: String,
    },
    /// The text is longer than the tokenizer's 32-bit positions.
    #[error("text of {0} bytes is too long to tokenize")]
    TooLong(usize),
    /// The chat template does not compile: a fault of the model or of the operator.
    #[error("chat template does not compile: {0}")]
    TemplateSyntax(String),
    /// The chat template refused the messages or failed on them. The message is fit for the
    /// client: it holds no more than the template and the client's own data say.
    #[error("chat template: {0}")]
    Template(String),
}
