use regex_automata::meta::Regex;
use regex_automata::{Anchored, Input};

use crate::TextError;

// The patterns are those of the models' own tokenizer.json files, less the tail
// `|\s+(?!\S)|\s+`, which ends each of them and is done in `Stage`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"##;

/// One pre-tokenizer and the names (`tokenizer.ggml.pre`) that mean it. The names and what they
/// stand for are the GGUF ecosystem's, set by llama.cpp's converter.
struct Family {
    names: &'static [&'static str],
    /// Applied one after the other, each to the pieces that the one before made.
    stages: &'static [Pattern],
    /// A word that is a token is not merged.
    ignore_merges: bool,
    /// Prompts start with `bos` where the file does not say.
    add_bos: bool,
}

enum Pattern {
    /// Splits off each match; what lies between matches stays whole.
    Split(&'static str),
    /// The same with the tail `|\s+(?!\S)|\s+` added.
    SplitSpaces(&'static str),
}
use Pattern::{Split, SplitSpaces};

const FAMILIES: &[Family] = &[
    Family {
        names: &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
        ],
        stages: &[SplitSpaces(GPT2)],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        stages: &[Split(r"\p{N}"), SplitSpaces(GPT2)],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "lfm2",
        ],
        stages: &[SplitSpaces(LLAMA3)],
        ignore_merges: true,
        add_bos: true,
    },
    Family {
        names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        stages: &[SplitSpaces(LLAMA3)],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "hunyuan",
            "megrez",
            "grok-2",
        ],
        stages: &[SplitSpaces(QWEN2)],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["qwen35"],
        stages: &[SplitSpaces(QWEN35)],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["gpt-4o", "llama4"],
        stages: &[SplitSpaces(GPT4O)],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["tekken"],
        stages: &[SplitSpaces(TEKKEN)],
        ignore_merges: true,
        add_bos: true,
    },
    Family {
        names: &["deepseek-v3", "hunyuan-dense"],
        stages: &[
            Split(r"\p{N}{1,3}"),
            Split(r"[一-龥぀-ゟ゠-ヿ]+"),
            SplitSpaces(DEEPSEEK3),
        ],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["default"],
        stages: &[
            Split(r"[\p{P}$+<=>^~|]+"),
            SplitSpaces(GPT2),
            Split(r"\p{N}+"),
            Split(r"[0-9][0-9][0-9]"),
        ],
        ignore_merges: false,
        add_bos: false,
    },
];

/// Splits text into words, which are encoded one by one.
pub(crate) struct PreTokenizer {
    stages: Vec<Stage>,
    pub(crate) ignore_merges: bool,
    pub(crate) add_bos: bool,
}

impl PreTokenizer {
    /// Errors with the known names when `name` is not one.
    pub(crate) fn named(name: &str) -> Result<Self, TextError> {
        let family = FAMILIES
            .iter()
            .find(|f| f.names.contains(&name))
            .ok_or_else(|| TextError::UnknownPreTokenizer {
                name: name.into(),
                known: known_names(),
            })?;
        Ok(Self {
            stages: family.stages.iter().map(Stage::new).collect(),
            ignore_merges: family.ignore_merges,
            add_bos: family.add_bos,
        })
    }

    /// Calls `word` with each word of `text`, in order; together they are all of it.
    pub(crate) fn split<'t>(&self, text: &'t str, word: &mut dyn FnMut(&'t str)) {
        split(&self.stages, text, word);
    }
}

fn split<'t>(stages: &[Stage], text: &'t str, word: &mut dyn FnMut(&'t str)) {
    let Some((stage, rest)) = stages.split_first() else {
        return word(text);
    };
    let mut at = 0;
    while at < text.len() {
        let (start, end) = stage.find(text, at);
        if at < start {
            split(rest, &text[at..start], word);
        }
        if start < end {
            split(rest, &text[start..end], word);
        }
        at = end;
    }
}

fn known_names() -> String {
    let names: Vec<&str> = FAMILIES.iter().flat_map(|f| f.names).copied().collect();
    names.join(", ")
}

/// One splitting pattern. Its engine has no look-around and no backtracking: time is linear in the
/// text, whatever the text (fancier engines give up, or change the split, on a long run of spaces).
struct Stage {
    /// Pattern 0 is the family's; pattern 1, if present, is `\s+`.
    regex: Regex,
}

impl Stage {
    fn new(pattern: &Pattern) -> Self {
        let regex = match pattern {
            Split(p) => Regex::new(p),
            SplitSpaces(p) => Regex::new_many(&[p, r"\s+"]),
        };
        Self {
            regex: regex.expect("the table's patterns are valid (tested)"),
        }
    }

    /// The first match at or after `at`, or the empty range at the end of the text.
    fn find(&self, text: &str, at: usize) -> (usize, usize) {
        let input = Input::new(text).range(at..);
        // Most patterns match everywhere: asking for a match right here is cheaper.
        let found = self
            .regex
            .search(&input.clone().anchored(Anchored::Yes))
            .or_else(|| self.regex.search(&input));
        let Some(m) = found else {
            return (text.len(), text.len());
        };
        let mut end = m.end();
        if m.pattern().as_usize() == 1 && end < text.len() {
            // `\s+(?!\S)|\s+`: a run of spaces before a word leaves its last one to the word,
            // unless it is the only one.
            let last = text[m.start()..end].chars().next_back();
            let shorter = end - last.map_or(0, char::len_utf8);
            if shorter > m.start() {
                end = shorter;
            }
        }
        (m.start(), end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let mut out = Vec::new();
        let pre = PreTokenizer::named(name).expect("known");
        pre.split(text, &mut |w| out.push(w));
        out
    }

    #[test]
    fn every_name_builds_and_loses_nothing() {
        let text = "It's 12345 o'clock,\r\n\n  naïve DON'T  東京タワー ３\t\tx\u{301} 👩‍👩‍👧!  ";
        for name in FAMILIES.iter().flat_map(|f| f.names) {
            let words = words(name, text);
            assert_eq!(words.concat(), text, "{name}");
            assert!(words.iter().all(|w| !w.is_empty()), "{name}");
        }
    }

    #[test]
    fn splits_as_the_families_do() {
        let text = "I'LL pay 1234  now\n\n ok";
        assert_eq!(
            words("gpt-2", text),
            ["I", "'", "LL", " pay", " 1234", " ", " now", "\n\n", " ok"]
        );
        assert_eq!(
            words("smollm", text),
            [
                "I", "'", "LL", " pay", " ", "1", "2", "3", "4", " ", " now", "\n\n", " ok"
            ]
        );
        assert_eq!(
            words("llama-bpe", text),
            [
                "I", "'LL", " pay", " ", "123", "4", " ", " now", "\n\n", " ok"
            ]
        );
        assert_eq!(
            words("qwen2", text),
            [
                "I", "'LL", " pay", " ", "1", "2", "3", "4", " ", " now", "\n\n", " ok"
            ]
        );
    }

    #[test]
    fn leaves_the_last_space_to_the_word() {
        assert_eq!(words("gpt-2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(words("gpt-2", "a\t b"), ["a", "\t", " b"]);
        assert_eq!(words("gpt-2", "a \tb"), ["a", " ", "\t", "b"]);
        assert_eq!(words("gpt-2", "a   "), ["a", "   "]);
        assert_eq!(words("smollm", "a   1"), ["a", "   ", "1"]);
        assert_eq!(words("llama-bpe", "a \n \n b"), ["a", " \n \n", " b"]);
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = PreTokenizer::named("gemma7").err().expect("unknown");
        assert!(error.to_string().contains("smollm"), "{error}");
    }
}
