use crate::TextError;
use crate::pretokenizer::{PreTokenizer, Stage};

// The patterns are those of the models' own tokenizer.json files, less the tail
// `|\s+(?!\S)|\s+`, which ends each of them and is done in `Stage`.
pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"##;

/// One pre-tokenizer and the names (`tokenizer.ggml.pre`) that mean it. The names and what they
/// stand for are the GGUF ecosystem's, set by llama.cpp's converter.
pub(crate) struct Family {
    names: &'static [&'static str],
    /// Applied one after the other, each to the pieces that the one before made.
    stages: &'static [Pattern],
    /// A word that is a token is not merged.
    pub(crate) ignore_merges: bool,
    /// Prompts start with `bos` where the file does not say.
    pub(crate) add_bos: bool,
    /// Text is composed first, as these models' own tokenizers do. llama.cpp does not.
    pub(crate) nfc: bool,
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
        nfc: false,
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
        nfc: false,
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
        nfc: false,
    },
    Family {
        names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        stages: &[SplitSpaces(LLAMA3)],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Family {
        names: &["qwen2"],
        stages: &[SplitSpaces(QWEN2)],
        ignore_merges: false,
        add_bos: false,
        nfc: true,
    },
    Family {
        names: &[
            "deepseek-r1-qwen",
            "stablelm2",
            "hunyuan",
            "megrez",
            "grok-2",
        ],
        stages: &[SplitSpaces(QWEN2)],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Family {
        names: &["qwen35"],
        stages: &[SplitSpaces(QWEN35)],
        ignore_merges: false,
        add_bos: false,
        nfc: true,
    },
    Family {
        names: &["gpt-4o", "llama4"],
        stages: &[SplitSpaces(GPT4O)],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Family {
        names: &["tekken"],
        stages: &[SplitSpaces(TEKKEN)],
        ignore_merges: true,
        add_bos: true,
        nfc: false,
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
        nfc: false,
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
        nfc: false,
    },
];

impl Family {
    /// Errors with the known names when `name` is not one.
    pub(crate) fn named(name: &str) -> Result<&'static Self, TextError> {
        let family = FAMILIES.iter().find(|f| f.names.contains(&name));
        family.ok_or_else(|| TextError::UnknownPreTokenizer {
            name: name.into(),
            known: known_names(),
        })
    }

    pub(crate) fn pre_tokenizer(&self) -> PreTokenizer {
        let stage = |pattern: &Pattern| {
            let (pattern, leaves_last_space) = match pattern {
                Split(p) => (*p, false),
                SplitSpaces(p) => (*p, true),
            };
            Stage::new(pattern, leaves_last_space).expect("the table's patterns are valid (tested)")
        };
        PreTokenizer::new(self.stages.iter().map(stage).collect())
    }
}

fn known_names() -> String {
    let names: Vec<&str> = FAMILIES.iter().flat_map(|f| f.names).copied().collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_builds_and_loses_nothing() {
        let text = "It's 12345 o'clock,\r\n\n  naïve DON'T  東京タワー ３\t\tx\u{301} 👩‍👩‍👧!  ";
        for name in FAMILIES.iter().flat_map(|f| f.names) {
            let mut words = Vec::new();
            let pre = Family::named(name).expect("known").pre_tokenizer();
            pre.split(text, &mut |w| words.push(w));
            assert_eq!(words.concat(), text, "{name}");
            assert!(words.iter().all(|w| !w.is_empty()), "{name}");
        }
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = Family::named("gemma7").err().expect("unknown");
        assert!(error.to_string().contains("smollm"), "{error}");
    }
}
