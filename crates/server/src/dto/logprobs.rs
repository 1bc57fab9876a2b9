//! Log-probabilities in the shapes of chat, of completions and of `prompt_logprobs`.

use serde::{Serialize, Serializer};
use spate_text::Tokenizer;
use spate_types::{Logprobs, TokenId};

/// JSON has no minus infinity; vLLM's stand-in.
const LOWEST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(LOWEST)
}

/// A JSON object in the order of insertion, of at most a few dozen entries.
#[derive(Debug)]
pub(crate) struct Table<V>(Vec<(String, V)>);

impl<V> Table<V> {
    fn insert_new(&mut self, key: String, value: V) {
        if self.0.iter().all(|(known, _)| *known != key) {
            self.0.push((key, value));
        }
    }
}

impl<V: Serialize> Serialize for Table<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

/// How tokens are written.
#[derive(Clone, Copy)]
pub(crate) struct TokenWriter<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// `token_id:ID` instead of the text.
    pub(crate) as_ids: bool,
}

impl TokenWriter<'_> {
    /// The token's text; bytes that are no UTF-8 by themselves become U+FFFD.
    fn text(self, id: TokenId) -> String {
        match self.as_ids {
            true => format!("token_id:{id}"),
            false => String::from_utf8_lossy(self.tokenizer.token_bytes(id)).into_owned(),
        }
    }

    /// Like [`Self::text`], but different for different bytes, as keys have to be.
    fn key(self, id: TokenId) -> String {
        let bytes = self.tokenizer.token_bytes(id);
        match std::str::from_utf8(bytes) {
            Err(_) if !self.as_ids => {
                let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
                format!("bytes:{hex}")
            }
            _ => self.text(id),
        }
    }
}

/// `choices[].logprobs` of chat.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<ChatTopToken>,
}

#[derive(Debug, Serialize)]
struct ChatTopToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn new<'a>(
        writer: TokenWriter<'_>,
        tokens: impl Iterator<Item = &'a Logprobs>,
    ) -> Self {
        let top_token = |&(id, logprob): &(TokenId, f32)| ChatTopToken {
            token: writer.text(id),
            logprob: finite(logprob),
            bytes: writer.tokenizer.token_bytes(id).to_vec(),
        };
        let content = tokens
            .map(|token| ChatToken {
                token: writer.text(token.token),
                logprob: finite(token.logprob),
                bytes: writer.tokenizer.token_bytes(token.token).to_vec(),
                top_logprobs: token.top.iter().map(top_token).collect(),
            })
            .collect();
        Self {
            content,
            refusal: None,
        }
    }
}

/// `choices[].logprobs` of completions: columns, one row a token.
#[derive(Debug, Default, Serialize)]
pub(crate) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Table<f32>>>,
}

impl CompletionLogprobs {
    /// Appends a token whose text begins at character `offset`; returns where the next one begins.
    pub(crate) fn push(
        &mut self,
        writer: TokenWriter<'_>,
        token: &Logprobs,
        offset: usize,
    ) -> usize {
        let mut top = Table(Vec::with_capacity(token.top.len() + 1));
        // The token itself is always there, even when it is not among the likeliest.
        for &(id, logprob) in token.top.iter().chain([&(token.token, token.logprob)]) {
            top.insert_new(writer.key(id), finite(logprob));
        }
        self.push_row(
            writer,
            token.token,
            Some(finite(token.logprob)),
            Some(top),
            offset,
        )
    }

    /// Appends the first token of an echoed prompt, which nothing predicted.
    pub(crate) fn push_unpredicted(
        &mut self,
        writer: TokenWriter<'_>,
        id: TokenId,
        offset: usize,
    ) -> usize {
        self.push_row(writer, id, None, None, offset)
    }

    fn push_row(
        &mut self,
        writer: TokenWriter<'_>,
        id: TokenId,
        logprob: Option<f32>,
        top: Option<Table<f32>>,
        offset: usize,
    ) -> usize {
        let plain = TokenWriter {
            as_ids: false,
            ..writer
        };
        self.text_offset.push(offset);
        self.token_logprobs.push(logprob);
        self.tokens.push(writer.key(id));
        self.top_logprobs.push(top);
        offset + plain.text(id).chars().count()
    }
}

/// `prompt_logprobs` in vLLM's shape: null for the first token, then for each token an object by
/// token id that always has the prompt's own.
pub(crate) type PromptLogprobs = Vec<Option<Table<PromptToken>>>;

#[derive(Debug, Serialize)]
pub(crate) struct PromptToken {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

pub(crate) fn prompt_logprobs(tokenizer: &Tokenizer, predicted: &[Logprobs]) -> PromptLogprobs {
    let writer = TokenWriter {
        tokenizer,
        as_ids: false,
    };
    let entry = |id: TokenId, logprob: f32, rank: u32| PromptToken {
        logprob: finite(logprob),
        rank,
        decoded_token: writer.text(id),
    };
    let rows = predicted.iter().map(|own| {
        let mut row = Table(Vec::with_capacity(own.top.len() + 1));
        row.insert_new(
            own.token.to_string(),
            entry(own.token, own.logprob, own.rank),
        );
        for (rank, &(id, logprob)) in (1..).zip(&own.top) {
            row.insert_new(id.to_string(), entry(id, logprob, rank));
        }
        Some(row)
    });
    std::iter::once(None).chain(rows).collect()
}
