use regex_automata::meta::{BuildError, Regex};
use regex_automata::{Anchored, Input};

/// Splits text into words, which are encoded one by one.
pub(crate) struct PreTokenizer {
    stages: Vec<Stage>,
}

impl PreTokenizer {
    /// Stages that are applied one after the other, each to the pieces that the one before made.
    pub(crate) fn new(stages: Vec<Stage>) -> Self {
        Self { stages }
    }

    /// Calls `word` with each word of `text`, in order; together they are all of it, unless a stage
    /// drops something.
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
        if at < start && !stage.drops_gaps {
            split(rest, &text[at..start], word);
        }
        if start < end {
            split(rest, &text[start..end], word);
        }
        at = end;
    }
}

/// One splitting pattern. Its engine has no look-around and no backtracking: time is linear in the
/// text, whatever the text (fancier engines give up, or change the split, on a long run of spaces).
pub(crate) struct Stage {
    /// Pattern 0 is the given one; pattern 1, if present, is `\s+`.
    regex: Regex,
    drops_gaps: bool,
}

impl Stage {
    /// Splits off each match of `pattern`; what lies between matches stays whole.
    /// `leaves_last_space` adds `|\s+(?!\S)|\s+` to the pattern.
    pub(crate) fn new(pattern: &str, leaves_last_space: bool) -> Result<Self, Box<BuildError>> {
        let regex = match leaves_last_space {
            false => Regex::new(pattern),
            true => Regex::new_many(&[pattern, r"\s+"]),
        };
        Ok(Self {
            regex: regex.map_err(Box::new)?,
            drops_gaps: false,
        })
    }

    /// Leaves out what lies between matches.
    pub(crate) fn dropping_gaps(self) -> Self {
        Self {
            drops_gaps: true,
            ..self
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
    use crate::families::Family;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let mut out = Vec::new();
        let pre = Family::named(name).expect("known").pre_tokenizer();
        pre.split(text, &mut |w| out.push(w));
        out
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
}
