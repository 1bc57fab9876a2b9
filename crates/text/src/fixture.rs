//! A small byte-level vocabulary for tests.

use crate::vocab::ByteAlphabet;
use crate::{Tokenizer, VocabSpec};

/// Control tokens of [`vocab`].
const CONTROL: &[&str] = &[
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|end|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "]~b]",
    "EOT",
];
/// User-defined tokens of [`vocab`].
const USER_DEFINED: &[&str] = &["<think>", "</think>", "\n\n\n"];

const MERGES: &[(&str, &str)] = &[
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġt", "he"),
    ("i", "n"),
    ("a", "a"),
    ("aa", "aa"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("o", "r"),
    ("Ġw", "or"),
    ("Ġwor", "l"),
    ("Ġworl", "d"),
    ("Ġ", "Ġ"),
    ("ĠĠ", "ĠĠ"),
    ("ð", "Ł"),
    ("ðŁ", "ĳ"),
    ("im", "_"),
    ("i", "m"),
    ("<", "|"),
    ("|", ">"),
    ("1", "2"),
];

/// Control tokens, the 256 bytes, what the merges make, user-defined tokens, in this order.
pub(crate) fn vocab() -> VocabSpec {
    let mut spec = VocabSpec {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        bos: Some(1),
        eos: Some(2),
        ..VocabSpec::default()
    };
    let mut add = |text: String, token_type| {
        spec.tokens.push(text);
        spec.token_types.push(token_type);
    };
    CONTROL.iter().for_each(|t| add((*t).into(), 3));
    (0..=255).for_each(|b| add(ByteAlphabet::char_of(b).into(), 1));
    MERGES.iter().for_each(|(a, b)| add(format!("{a}{b}"), 1));
    USER_DEFINED.iter().for_each(|t| add((*t).into(), 4));
    add("[PAD]".into(), 5);
    spec.merges = MERGES.iter().map(|(a, b)| format!("{a} {b}")).collect();
    spec
}

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_vocab(vocab()).expect("the fixture is valid")
}
