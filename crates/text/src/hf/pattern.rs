use regex_automata::util::syntax;
use serde::Deserialize;

use crate::pretokenizer::Stage;

/// What a `Split` or `Replace` looks for.
#[derive(Deserialize, Debug)]
pub(super) enum Pattern {
    String(String),
    Regex(String),
}

/// The end of most patterns: a run of spaces before a word leaves its last one to the word. It
/// looks around, which our engine can't; [`Stage`] does it by hand.
const SPACES: &str = r"|\s+(?!\S)|\s+";

/// A splitting stage of a regular expression in Oniguruma's syntax, as far as it means the same in
/// ours; what is wrong with it otherwise.
pub(super) fn stage(pattern: &str) -> Result<Stage, String> {
    let (body, leaves_last_space) = match pattern.strip_suffix(SPACES) {
        Some(body) => (body, true),
        None => (pattern, false),
    };
    let hir = syntax::parse(body).map_err(|e| e.to_string())?;
    let properties = hir.properties();
    if !properties.look_set().is_empty() {
        return Err("anchors and word boundaries are not supported".into());
    }
    if properties.minimum_len() == Some(0) {
        return Err("it matches the empty text".into());
    }
    if has_possessive(body) {
        return Err("possessive quantifiers are not supported".into());
    }
    Stage::new(body, leaves_last_space).map_err(|e| e.to_string())
}

/// Whether a `+` follows a quantifier: then Oniguruma does not backtrack into what is quantified, and
/// our syntax repeats it.
fn has_possessive(pattern: &str) -> bool {
    let mut class_depth = 0u32;
    let mut after_quantifier = false;
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        let was = std::mem::take(&mut after_quantifier);
        match c {
            '\\' => {
                let takes_braces = chars.next().is_some_and(|c| "pPxu".contains(c));
                // The braces of `\p{L}` repeat nothing.
                if takes_braces && chars.as_str().starts_with('{') {
                    chars.find(|&c| c == '}');
                }
            }
            '[' => class_depth += 1,
            ']' => class_depth = class_depth.saturating_sub(1),
            '+' if class_depth == 0 && was => return true,
            '?' | '*' | '+' | '}' if class_depth == 0 => after_quantifier = true,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_would_split_otherwise() {
        for (pattern, why) in [
            (r"a(?=b)", "look-around"),
            (r"(a)\1", "backreference"),
            (r"^a", "anchors"),
            (r"\bab", "word boundaries"),
            (r"a*", "empty"),
            (r"a?+b", "possessive"),
            (r"[a-z]{1,3}+b", "possessive"),
            (r"a(", "unclosed"),
            (r"\s+(?!\S)", "look-around"),
        ] {
            let error = stage(pattern).err().expect(pattern);
            assert!(error.contains(why), "{pattern}: {error}");
        }
        for pattern in [
            r"[*+]+|\?+",
            r"a+?b",
            r"\p{N}{1,3}| ?[^\s\p{L}]+|\s+(?!\S)|\s+",
        ] {
            assert!(stage(pattern).is_ok(), "{pattern}");
        }
    }
}
