//! Small vocabularies for tests.

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

/// A SentencePiece vocabulary: unknown, `<s>`, `</s>`, the bytes, then pieces, the best first.
pub(crate) fn sentencepiece(add_space_prefix: bool) -> VocabSpec {
    let pieces = [
        "▁",
        "▁▁",
        "a",
        "b",
        "h",
        "e",
        "é",
        "中",
        "▁a",
        "ab",
        "he",
        "▁he",
        "▁ab",
        "▁▁▁▁",
    ];
    let bytes = (0..=255).map(|b| format!("<0x{b:02X}>"));
    let mut spec = VocabSpec {
        model: "llama".into(),
        bos: Some(1),
        eos: Some(2),
        add_space_prefix: Some(add_space_prefix),
        ..VocabSpec::default()
    };
    let control = ["<unk>", "<s>", "</s>", "[INST]"].map(String::from);
    spec.tokens.extend(control);
    spec.token_types.extend([2, 3, 3, 3]);
    spec.tokens.extend(bytes);
    spec.token_types.extend([6; 256]);
    spec.tokens.extend(pieces.map(String::from));
    spec.token_types.extend([1; 14]);
    spec.tokens.extend(["<mark>", "  x"].map(String::from));
    spec.token_types.extend([4; 2]);
    spec.scores = (0..spec.tokens.len()).map(|id| -(id as f32)).collect();
    spec
}
