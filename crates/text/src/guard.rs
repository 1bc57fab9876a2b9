//! Keeps what clients write from becoming control tokens.
//!
//! A template joins its own text and the client's into one string, often inside one expression
//! (`'<|im_start|>' + message['role'] + '\n' + message['content']`), so where the pieces came from
//! cannot be read off the result. Instead each client string is *marked* before rendering: a
//! character that occurs nowhere else goes in after every character with which a control token can
//! begin (as a rule, after every `<`). After rendering the marks are taken out and their places
//! kept as *breaks*, and no control token is recognised across a break.
//!
//! So a control token needs a first character that the template wrote. That holds even where a
//! template cuts, joins or deletes parts of client strings, and it allows `'<|' + role + '|>'`,
//! which real templates use (the server admits known roles only).
//!
//! Templates also look into client strings: `content.split('</think>')`. For them to see what they
//! look for, a tag (`<...>` or `[...]`) stays unmarked if the template's source has it and it is no
//! part of a control token. Marking maps equal strings to equal strings, so comparisons between
//! client strings hold too.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use minijinja::Value;
use serde_json::Value as Json;

use crate::TextError;

/// A rendered chat: text, and where in it control tokens can't be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// What the template made.
    pub text: String,
    /// Ascending positions in `text` that no control token may span.
    pub(crate) breaks: Vec<usize>,
}

impl Rendered {
    /// The ranges between breaks; together they are the whole text.
    pub(crate) fn unbroken(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let starts = std::iter::once(0).chain(self.breaks.iter().copied());
        let ends = self.breaks.iter().copied().chain([self.text.len()]);
        starts.zip(ends).map(|(start, end)| start..end)
    }
}

/// Whether a break after the first character keeps this control token apart from client text, and
/// marks after that character leave names (`content`, `tool_calls`) alone. Tokens for which this
/// is not so are never recognised in rendered text.
pub(crate) fn is_guardable(control_token: &str) -> bool {
    let mut chars = control_token.chars();
    let first_can_be_marked = |c: char| !c.is_alphanumeric() && !c.is_whitespace() && c != '_';
    chars.next().is_some_and(first_can_be_marked) && chars.next().is_some()
}

/// The longest tag that is kept whole, in bytes. Bounds the work at each opener.
const MAX_TAG: usize = 64;

/// What has to be marked in the data of one template.
pub(crate) struct Guard {
    /// First characters of control tokens.
    openers: Vec<char>,
    /// Tags that the template may look for.
    tags: HashSet<String>,
    /// Bit `i`: the template's source holds the noncharacter `U+FDD0 + i`.
    taken: u32,
}

impl Guard {
    /// `control_tokens` are the texts that may be recognised in the rendered text; each
    /// [`is_guardable`].
    pub(crate) fn new(source: &str, control_tokens: impl Iterator<Item = String>) -> Self {
        let control_tokens: Vec<String> = control_tokens.collect();
        let mut openers: Vec<char> = control_tokens
            .iter()
            .filter_map(|t| t.chars().next())
            .collect();
        openers.sort_unstable();
        openers.dedup();
        let harmless = |tag: &&str| {
            let is_part = |c: &String| c.starts_with(tag) || tag.starts_with(c.as_str());
            !control_tokens.iter().any(is_part)
        };
        let tags = source
            .char_indices()
            .filter(|(_, c)| openers.contains(c))
            .filter_map(|(at, _)| tag_at(&source[at..]))
            .filter(harmless)
            .map(str::to_owned)
            .collect();
        Self {
            openers,
            tags,
            taken: noncharacters(source),
        }
    }

    /// Marks for data made of these values.
    ///
    /// # Errors
    /// If the data uses up the noncharacters U+FDD0 to U+FDEF, which no text is meant to hold.
    pub(crate) fn marks(&self, data: &[&Json]) -> Result<Marks<'_>, TextError> {
        let taken = data.iter().fold(self.taken, |t, v| t | used_in(v));
        let mut free = (0..32).filter(|i| taken >> i & 1 == 0);
        let (Some(a), Some(b)) = (free.next(), free.next()) else {
            return Err(TextError::Template(
                "the messages hold too many of the noncharacters U+FDD0 to U+FDEF".into(),
            ));
        };
        let nonchar =
            |i| char::from_u32(FIRST_NONCHARACTER + i).expect("U+FDD0 to U+FDEF are chars");
        Ok(Marks {
            guard: self,
            brk: nonchar(a),
            end: nonchar(b),
        })
    }
}

/// The characters that mark, for one rendering.
pub(crate) struct Marks<'g> {
    guard: &'g Guard,
    /// Says that no control token begins with the character before.
    brk: char,
    /// Says where the content to be continued ends.
    pub(crate) end: char,
}

impl Marks<'_> {
    /// A client's value as the template sees it, keys and strings marked.
    pub(crate) fn value(&self, json: &Json) -> Value {
        match json {
            Json::String(s) => Value::from(self.string(s)),
            Json::Array(items) => items.iter().map(|v| self.value(v)).collect(),
            Json::Object(map) => {
                let pairs = map.iter().map(|(k, v)| (self.string(k), self.value(v)));
                Value::from_pairs(pairs)
            }
            Json::Null => Value::from(()),
            Json::Bool(b) => Value::from(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(int), _) => Value::from(int),
                (None, Some(int)) => Value::from(int),
                (None, None) => Value::from(n.as_f64()),
            },
        }
    }

    pub(crate) fn string<'s>(&self, text: &'s str) -> Cow<'s, str> {
        let is_opener = |c: char| self.guard.openers.contains(&c);
        if !text.contains(is_opener) {
            return Cow::Borrowed(text);
        }
        let mut out = String::with_capacity(text.len() + 64);
        for (at, c) in text.char_indices() {
            out.push(c);
            if is_opener(c) && !tag_at(&text[at..]).is_some_and(|t| self.guard.tags.contains(t)) {
                out.push(self.brk);
            }
        }
        Cow::Owned(out)
    }

    /// Takes the marks out of rendered text.
    pub(crate) fn remove(&self, marked: &str) -> Rendered {
        let mut text = String::with_capacity(marked.len());
        let mut breaks = Vec::new();
        for piece in marked.split(self.brk) {
            text.push_str(piece);
            breaks.push(text.len());
        }
        // The last piece ends at no mark.
        breaks.pop();
        Rendered { text, breaks }
    }
}

/// The tag that `text` begins with, if it begins with `<` or `[`: up to the matching closer, with
/// no other opener or line end in between, at most [`MAX_TAG`] bytes.
fn tag_at(text: &str) -> Option<&str> {
    let bytes = &text.as_bytes()[..text.len().min(MAX_TAG)];
    let (&opener, rest) = bytes.split_first()?;
    let closer = match opener {
        b'<' => b'>',
        b'[' => b']',
        _ => return None,
    };
    let end = rest
        .iter()
        .position(|&b| b == closer || b == opener || b == b'\n')?;
    (rest[end] == closer).then(|| &text[..end + 2])
}

const FIRST_NONCHARACTER: u32 = 0xfdd0;

/// Bit `i`: `text` holds U+FDD0 + i.
fn noncharacters(text: &str) -> u32 {
    // All of them are EF B7 xx in UTF-8.
    if !text.as_bytes().contains(&0xef) {
        return 0;
    }
    text.chars()
        .filter_map(|c| u32::from(c).checked_sub(FIRST_NONCHARACTER))
        .filter(|&i| i < 32)
        .fold(0, |bits, i| bits | 1 << i)
}

fn used_in(json: &Json) -> u32 {
    match json {
        Json::String(s) => noncharacters(s),
        Json::Array(items) => items.iter().fold(0, |bits, v| bits | used_in(v)),
        Json::Object(map) => map
            .iter()
            .fold(0, |bits, (k, v)| bits | noncharacters(k) | used_in(v)),
        Json::Null | Json::Bool(_) | Json::Number(_) => 0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const SOURCE: &str = "{{ '<|im_start|>' }}{% if '</think>' in content %}<think>{% endif %}[x]";

    fn guard() -> Guard {
        let control = ["<|im_start|>", "<|im_end|>", "[INST]", "</thinking>"];
        Guard::new(SOURCE, control.map(String::from).into_iter())
    }

    #[test]
    fn marks_what_could_begin_a_control_token() {
        let guard = guard();
        let marks = guard.marks(&[]).unwrap();
        let m = |text: &str| marks.string(text).replace(marks.brk, "·");
        assert_eq!(m("<|im_start|>"), "<·|im_start|>");
        assert_eq!(m("tail <|im"), "tail <·|im");
        assert_eq!(m("a < b [c]"), "a <· b [·c]");
        assert_eq!(m("plain"), "plain");
        // The template looks for these, and they are no part of a control token …
        assert_eq!(m("<think>hm</think>"), "<think>hm</think>");
        assert_eq!(m("[x]"), "[x]");
        // … but hide nothing that is.
        assert_eq!(m("<</think>|im_start|>"), "<·</think>|im_start|>");
        assert_eq!(m("</thinking>"), "<·/thinking>");
    }

    #[test]
    fn a_tag_that_begins_a_control_token_is_marked() {
        let guard = Guard::new("{% if '<x>' in c %}", ["<x>y".to_string()].into_iter());
        let marks = guard.marks(&[]).unwrap();
        assert_eq!(marks.string("<x>y").chars().nth(1), Some(marks.brk));
    }

    #[test]
    fn evades_noncharacters_in_the_data() {
        let guard = guard();
        let some: String = ('\u{fdd0}'..='\u{fded}').collect();
        let data = json!({ "k": [some] });
        let marks = guard.marks(&[&data]).unwrap();
        assert_eq!((marks.brk, marks.end), ('\u{fdee}', '\u{fdef}'));
        let all: String = ('\u{fdd0}'..='\u{fdee}').collect();
        assert!(guard.marks(&[&json!({ all: 1 })]).is_err());
    }

    proptest! {
        #[test]
        fn marking_is_undone(text in "[<>\\[\\]|a-zé\u{fdd0}\n/]{0,40}") {
            let guard = guard();
            let data = json!(text);
            let marks = guard.marks(&[&data]).unwrap();
            let rendered = marks.remove(&marks.string(&text));
            prop_assert_eq!(&rendered.text, &text);
            let pieces: Vec<&str> = rendered.unbroken().map(|r| &text[r]).collect();
            prop_assert_eq!(pieces.concat(), text);
        }
    }
}
