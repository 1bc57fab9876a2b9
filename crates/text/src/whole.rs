use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use spate_types::TokenId;

use crate::TextError;

/// A token that is matched whole.
#[derive(Debug, Clone)]
pub(crate) struct WholeToken {
    pub(crate) id: TokenId,
    /// As it is looked for.
    pub(crate) text: String,
    /// Takes the whitespace before it along.
    pub(crate) lstrip: bool,
    /// Takes the whitespace after it along.
    pub(crate) rstrip: bool,
}

/// Finds tokens that are matched whole: at each place the longest, from left to right.
pub(crate) struct WholeTokens {
    matcher: AhoCorasick,
    /// By the matcher's pattern number.
    tokens: Vec<WholeToken>,
}

/// A token found at `start .. end`.
pub(crate) struct Found {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) id: TokenId,
}

impl WholeTokens {
    pub(crate) fn new(tokens: Vec<WholeToken>) -> Result<Self, TextError> {
        let matcher = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|t| &t.text))
            .map_err(|e| TextError::Vocab(format!("too many control tokens: {e}")))?;
        Ok(Self { matcher, tokens })
    }

    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.tokens.iter().map(|t| t.text.as_str())
    }

    /// The tokens in `text[range]`, which do not overlap; positions are relative to `text`.
    pub(crate) fn find(&self, text: &str, range: Range<usize>) -> Vec<Found> {
        let mut found = Vec::new();
        let mut free = range.start;
        for m in self.matcher.find_iter(&text[range.clone()]) {
            let token = &self.tokens[m.pattern().as_usize()];
            let mut start = range.start + m.start();
            let mut end = range.start + m.end();
            // The token before may have taken along whitespace that is a token itself.
            if start < free {
                continue;
            }
            if token.lstrip {
                start = free + text[free..start].trim_end().len();
            }
            if token.rstrip {
                end = range.end - text[end..range.end].trim_start().len();
            }
            found.push(Found {
                start,
                end,
                id: token.id,
            });
            free = end;
        }
        found
    }
}
