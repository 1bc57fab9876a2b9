//! Our byte-level BPE against the `tokenizers` crate, on random vocabularies.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use spate_text::{Tokenizer, VocabSpec};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizedString, Normalizer, SplitDelimiterBehavior, Tokenizer as Oracle};

/// GPT-2's printable alphabet, by byte, as the oracle has it.
fn alphabet() -> Vec<String> {
    let mut printable: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    printable.sort_unstable();
    let (own, shifted): (Vec<char>, Vec<char>) = printable.iter().partition(|&&c| c < '\u{100}');
    let mut shifted = shifted.into_iter();
    let of_byte = |b: u8| match char::from(b) {
        c if own.contains(&c) => c,
        _ => shifted.next().unwrap(),
    };
    (0..=255).map(of_byte).map(String::from).collect()
}

/// A vocabulary whose merges join the tokens that `picks` names. `bytes` are the ones that occur.
fn vocab(
    pre: &str,
    bytes: &[u8],
    picks: &[(prop::sample::Index, prop::sample::Index)],
) -> VocabSpec {
    let mut tokens = alphabet();
    let mut pool: Vec<String> = bytes
        .iter()
        .map(|&b| tokens[usize::from(b)].clone())
        .collect();
    let mut merges = Vec::new();
    for (left, right) in picks {
        let (left, right) = (left.get(&pool).clone(), right.get(&pool).clone());
        let joined = format!("{left}{right}");
        if joined.chars().count() <= 16 && !tokens.contains(&joined) {
            merges.push(format!("{left} {right}"));
            tokens.push(joined.clone());
            pool.push(joined);
        }
    }
    VocabSpec {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        merges,
        ..VocabSpec::default()
    }
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn oracle(spec: &VocabSpec) -> Oracle {
    let ids = spec.tokens.iter().cloned().zip(0..);
    let merge = |m: &String| {
        m.split_once(' ')
            .map(|(a, b)| (a.into(), b.into()))
            .unwrap()
    };
    let merges = spec.merges.iter().map(merge).collect();
    let pre = spec.pre.as_deref().unwrap();
    let bpe = BPE::builder()
        .vocab_and_merges(ids.collect::<Vocab>(), merges)
        .ignore_merges(pre == "llama-bpe")
        .build()
        .unwrap();
    let split = |regex: &str| {
        let pattern = SplitPattern::Regex(regex.into());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
        let bytes = ByteLevel::new(false, false, false);
        PreTokenizerWrapper::from(Sequence::new(vec![split.into(), bytes.into()]))
    };
    let byte_level = ByteLevel::new(false, false, true);
    let mut oracle = Oracle::new(bpe);
    if pre == "qwen2" {
        oracle.with_normalizer(Some(NFC)).unwrap();
    }
    oracle.with_pre_tokenizer(Some(match pre {
        "gpt-2" => byte_level.into(),
        "smollm" => Sequence::new(vec![Digits::new(true).into(), byte_level.into()]).into(),
        "llama-bpe" => split(LLAMA3),
        "qwen2" => split(QWEN2),
        other => panic!("no oracle for {other}"),
    }));
    oracle
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Few letters and many merges of them, so that candidate merges overlap and go stale.
    #[test]
    fn same_merges(
        picks in prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..40),
        text in "[ab]{0,60}",
    ) {
        let spec = vocab("gpt-2", b"ab", &picks);
        let expected = oracle(&spec).encode(text.as_str(), false).unwrap();
        let ours = Tokenizer::from_vocab(spec).unwrap();
        let tokens = ours.encode(&text, false, false).unwrap();
        prop_assert_eq!(tokens.as_slice(), expected.get_ids());
    }

    #[test]
    fn same_tokens(
        pre in prop::sample::select(vec!["gpt-2", "smollm", "llama-bpe", "qwen2"]),
        picks in prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..60),
        text in "([ab ]{1,8}|[ab1 '\n\r\té中!s]{1,6}|'LL|\u{200d}|👩|\u{301}|²|\u{3000}){0,12}",
    ) {
        let spec = vocab(pre, "ab 1é'\n!".as_bytes(), &picks);
        let oracle = oracle(&spec);
        let expected = oracle.encode(text.as_str(), false).unwrap();
        let ours = Tokenizer::from_vocab(spec).unwrap();
        let tokens = ours.encode(&text, false, false).unwrap();
        prop_assert_eq!(tokens.as_slice(), expected.get_ids());
        let composed = match oracle.get_normalizer() {
            Some(nfc) => {
                let mut composed = NormalizedString::from(text);
                nfc.normalize(&mut composed).unwrap();
                composed.get().to_owned()
            }
            None => text,
        };
        prop_assert_eq!(ours.decode(&tokens, false), composed);
    }
}

#[test]
fn bytes_without_a_token_are_left_out_as_there() {
    let mut spec = vocab("gpt-2", b"ab", &[]);
    spec.merges.push("a b".into());
    spec.tokens.push("ab".into());
    let missing = alphabet()[4].clone();
    spec.tokens[4] = "unused".into();
    assert!(!spec.tokens.contains(&missing));
    let text = "a\u{4}b a\u{4}\u{4}";
    let expected = oracle(&spec).encode(text, false).unwrap();
    let ours = Tokenizer::from_vocab(spec).unwrap();
    assert_eq!(ours.encode(text, false, false).unwrap(), expected.get_ids());
}
