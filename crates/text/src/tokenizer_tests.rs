#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::fixture;
use crate::{Detokenizer, TextError, Tokenizer, VocabSpec};

fn texts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let text = |&id: &u32| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
    ids.iter().map(text).collect()
}

#[test]
fn merges_words() {
    let t = fixture::tokenizer();
    let ids = t.encode("hello the world 12", true, true).unwrap();
    assert_eq!(texts(&t, &ids), ["hello", " the", " world", " ", "1", "2"]);
    assert!(t.encode("", true, true).unwrap().is_empty());
}

#[test]
fn control_tokens_only_where_allowed() {
    let t = fixture::tokenizer();
    let text = "<|im_start|>hello<|im_end|>EOT";
    let ids = t.encode(text, false, true).unwrap();
    assert_eq!(
        texts(&t, &ids),
        ["<|im_start|>", "hello", "<|im_end|>", "EOT"]
    );
    let plain = t.encode(text, false, false).unwrap();
    assert!(plain.iter().all(|&id| !t.is_special(id)));
    assert_eq!(t.decode(&plain, true), text);
    assert_eq!(t.decode(&ids, true), "hello");
    assert_eq!(t.decode(&ids, false), text);
}

#[test]
fn user_defined_tokens_match_in_any_text_the_longest_first() {
    let mut spec = fixture::vocab();
    spec.tokens.push("<think>ing".into());
    spec.token_types.push(4);
    let t = Tokenizer::from_vocab(spec).unwrap();
    for parse_special in [false, true] {
        let ids = t
            .encode("<think><think>ing\n\n\n\n", false, parse_special)
            .unwrap();
        assert_eq!(texts(&t, &ids), ["<think>", "<think>ing", "\n\n\n", "\n"]);
        assert!(ids.iter().all(|&id| !t.is_special(id)), "it is text");
    }
}

#[test]
fn bos_and_eos_as_the_model_wants_them() {
    let encode = |spec: VocabSpec, add| {
        let t = Tokenizer::from_vocab(spec).unwrap();
        t.encode("a", add, true).unwrap()
    };
    let spec = || fixture::vocab();
    let a = encode(spec(), true);
    assert_eq!(a.len(), 1, "smollm adds nothing by itself");
    let with = |add_bos, add_eos| VocabSpec {
        add_bos,
        add_eos,
        ..spec()
    };
    assert_eq!(encode(with(Some(true), Some(true)), true), [1, a[0], 2]);
    assert_eq!(encode(with(Some(true), Some(true)), false), a);
    let llama = VocabSpec {
        pre: Some("llama-bpe".into()),
        ..spec()
    };
    assert_eq!(encode(llama.clone(), true), [1, a[0]]);
    assert_eq!(encode(VocabSpec { bos: None, ..llama }, true), a);

    let t = Tokenizer::from_vocab(VocabSpec {
        eot: Some(2),
        ..spec()
    })
    .unwrap();
    assert_eq!(
        (t.bos_text(), t.eos_text(), t.eos_ids()[0]),
        ("<|im_start|>", "<|im_end|>", 2)
    );
    let t = Tokenizer::from_vocab(VocabSpec {
        eot: Some(7),
        ..spec()
    })
    .unwrap();
    assert_eq!(t.eos_ids()[..2], [2, 7]);
}

#[test]
fn refuses_what_it_cannot_do_right() {
    let refused = |change: &dyn Fn(&mut VocabSpec)| {
        let mut spec = fixture::vocab();
        change(&mut spec);
        Tokenizer::from_vocab(spec).err().unwrap()
    };
    assert!(
        refused(&|s| s.model = "bert".into())
            .to_string()
            .contains("bert")
    );
    assert!(
        refused(&|s| s.model = "llama".into())
            .to_string()
            .contains("scores")
    );
    refused(&|s| s.add_space_prefix = Some(true));
    refused(&|s| s.token_types[0] = 7);
    refused(&|s| s.token_types[0] = -1);
    refused(&|s| s.token_types.push(1));
    assert!(matches!(
        refused(&|s| s.pre = Some("x".into())),
        TextError::UnknownPreTokenizer { .. }
    ));
    assert!(
        refused(&|s| s.eos = Some(1 << 20))
            .to_string()
            .contains("eos")
    );
    assert!(
        refused(&|s| s.merges.push("zz y".into()))
            .to_string()
            .contains("zz y")
    );
    assert!(
        refused(&|s| s.merges.push("a".into()))
            .to_string()
            .contains("merge")
    );
    refused(&|s| s.tokens.clear());
}

#[test]
fn sentencepiece_merges_by_score_and_spells_the_rest() {
    let encode = |prefix, text| {
        let t = Tokenizer::from_vocab(fixture::sentencepiece(prefix)).unwrap();
        texts(&t, &t.encode(text, true, true).unwrap())
    };
    assert_eq!(encode(true, "he abab"), ["<s>", " he", " ab", "ab"]);
    assert_eq!(encode(false, "he ab"), ["<s>", "he", " ab"]);
    assert_eq!(encode(true, ""), ["<s>"]);
    // A space before the text, and after each token that is matched whole.
    assert_eq!(encode(true, " a"), ["<s>", "  ", "a"]);
    assert_eq!(
        encode(true, "[INST]a<mark>a  x"),
        ["<s>", "[INST]", " a", "<mark>", " a", "  x"]
    );
    assert_eq!(encode(false, "b\n"), ["<s>", "b", "\n"]);
    let t = Tokenizer::from_vocab(fixture::sentencepiece(false)).unwrap();
    let spelt = t.encode("👩", false, true).unwrap();
    assert_eq!(spelt, [0xf0, 0x9f, 0x91, 0xa9].map(|b| b + 4));
    assert_eq!(t.decode(&spelt, true), "👩");
}

#[test]
fn equal_scores_merge_from_the_left() {
    let mut spec = fixture::sentencepiece(false);
    for text in ["bé", "éa"] {
        spec.tokens.push(text.into());
        spec.token_types.push(1);
        spec.scores.push(-1000.0);
    }
    let t = Tokenizer::from_vocab(spec).unwrap();
    let split = |text| texts(&t, &t.encode(text, false, true).unwrap());
    assert_eq!(split("béa"), ["bé", "a"]);
    assert_eq!(split("éabéa"), ["é", "ab", "éa"]);
}

#[test]
fn tokens_that_join_words_are_found() {
    let mut spec = fixture::sentencepiece(false);
    spec.tokens.push("a▁b".into());
    spec.token_types.push(1);
    spec.scores.push(1.0);
    let t = Tokenizer::from_vocab(spec).unwrap();
    // "▁b" is no token, so the score alone can't join "a▁" and "b": there is no "a▁" either.
    let split = |t: &Tokenizer, text| texts(t, &t.encode(text, false, true).unwrap());
    assert_eq!(split(&t, "a b"), ["a", " ", "b"]);
    let mut spec = fixture::sentencepiece(false);
    for (text, score) in [("▁b", 2.0), ("a▁b", 1.0)] {
        spec.tokens.push(text.into());
        spec.token_types.push(1);
        spec.scores.push(score);
    }
    let t = Tokenizer::from_vocab(spec).unwrap();
    assert_eq!(split(&t, "a b a b"), ["a b", " ", "a b"]);
}

#[test]
fn control_tokens_take_whitespace_along_where_the_model_wants_it() {
    let spec = |control_rstrip| VocabSpec {
        control_rstrip,
        ..fixture::sentencepiece(false)
    };
    let encode = |spec| {
        let t = Tokenizer::from_vocab(spec).unwrap();
        texts(&t, &t.encode("<s> [INST] \n a", false, true).unwrap())
    };
    assert_eq!(encode(spec(true)), ["<s>", " ", "[INST]", "a"]);
    assert_eq!(encode(spec(false)), ["<s>", " ", "[INST]", " ", "\n", " a"]);
}

#[test]
fn refuses_sentencepiece_vocabularies_it_cannot_use() {
    let refused = |change: &dyn Fn(&mut VocabSpec)| {
        let mut spec = fixture::sentencepiece(true);
        change(&mut spec);
        Tokenizer::from_vocab(spec).err().unwrap().to_string()
    };
    let missing = refused(&|s| s.tokens[4 + 0x41] = "gone".into());
    assert!(missing.contains("<0x"), "{missing}");
    let missing = refused(&|s| {
        s.tokens[4 + 0x41] = "gone".into();
        s.token_types[4 + 0x41] = 1;
    });
    assert!(missing.contains("<0x41>"), "{missing}");
    assert!(refused(&|s| s.scores[261] = f32::NAN).contains("token 261"));
    assert!(refused(&|s| s.tokens[270] = "x".repeat(2000)).contains("long"));
}

#[test]
fn more_ways_to_end() {
    let mut spec = fixture::vocab();
    spec.tokens[4] = "<end_of_turn>".into();
    let t = Tokenizer::from_vocab(spec).unwrap();
    assert_eq!(
        t.eos_ids(),
        [2, 4, 0],
        "eos, then <end_of_turn> and <|endoftext|>, which the file does not name"
    );
    let t = t.with_eos_ids(&[4, 7]).unwrap();
    assert_eq!(t.eos_ids(), [2, 4, 0, 7]);
    assert_eq!(t.eos_text(), "<|im_end|>");
    let outside = t.vocab_size() as u32;
    assert!(t.with_eos_ids(&[outside]).is_err());
}

#[test]
fn synthetic_tokenizers_round_trip() {
    let t = Tokenizer::synthetic(300).unwrap();
    assert_eq!(t.vocab_size(), 300);
    let text = "any text:\t\u{0} é 中 👩";
    let ids = t.encode(text, true, true).unwrap();
    assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(t.decode(&ids, true), text);
    assert_eq!(t.decode(&[256, 299], true), " t256 t299");
    assert!(t.eos_ids().is_empty());
    assert!(Tokenizer::synthetic(255).is_err());
}

#[test]
fn odd_ids_decode_to_nothing() {
    let t = fixture::tokenizer();
    let pad = t.vocab_size() as u32 - 1;
    assert_eq!(t.decode(&[u32::MAX, t.vocab_size() as u32], false), "");
    assert_eq!(t.token_bytes(u32::MAX), b"");
    assert_eq!(t.decode(&[pad], true), "");
    assert!(t.is_special(pad) && t.is_special(u32::MAX));
    assert_eq!(t.max_token_bytes(), "<|endoftext|>".len());
}

/// A13: whatever the text, time is about linear in its length.
#[test]
fn a_megabyte_of_anything_is_quick() {
    let sentencepiece = Tokenizer::from_vocab(fixture::sentencepiece(true)).unwrap();
    for t in [fixture::tokenizer(), sentencepiece] {
        a_megabyte_is_quick_with(&t);
    }
}

fn a_megabyte_is_quick_with(t: &Tokenizer) {
    let units = [
        "a",
        " ",
        "\n",
        "7",
        "!",
        "\u{200d}",
        "👩\u{200d}👩\u{200d}",
        "e\u{301}",
        "<|im_start|",
        "<",
        "' ",
        " \t\u{3000}",
    ];
    for unit in units {
        let text = unit.repeat(1_000_000 / unit.len());
        let start = Instant::now();
        let ids = t.encode(&text, false, true).unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{unit:?}: {:?}",
            start.elapsed()
        );
        assert_eq!(t.decode(&ids, false), text);
    }
}

proptest! {
    #[test]
    fn decoding_undoes_encoding(text in any::<String>(), parse_special: bool) {
        let t = fixture::tokenizer();
        let ids = t.encode(&text, false, parse_special).unwrap();
        prop_assert_eq!(t.decode(&ids, false), text);
    }

    #[test]
    fn sentencepiece_decoding_undoes_encoding(text in "[ab é中👩\n▁]{0,20}", prefix: bool) {
        let t = Tokenizer::from_vocab(fixture::sentencepiece(prefix)).unwrap();
        let ids = t.encode(&text, true, true).unwrap();
        // ▁ is how the vocabulary writes a space.
        prop_assert_eq!(t.decode(&ids, true), text.replace('▁', " "));
    }

    #[test]
    fn text_in_pieces_is_the_whole_text(
        kind in 0..3,
        ids in prop::collection::vec(0..320u32, 0..60),
        cut: prop::sample::Index,
        skip: bool,
    ) {
        let t = Arc::new(match kind {
            0 => fixture::tokenizer(),
            _ => Tokenizer::from_vocab(fixture::sentencepiece(kind == 1)).unwrap(),
        });
        let run = |mut detokenizer: Detokenizer, ids: &[u32]| {
            let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
            text.push_str(&detokenizer.flush());
            text
        };
        let whole = t.decode(&ids, skip);
        prop_assert_eq!(&run(Detokenizer::at_start(t.clone(), skip), &ids), &whole);

        let shown = ids.iter().filter(|&&id| !(skip && t.is_special(id)));
        let bytes: Vec<u8> = shown.flat_map(|&id| t.token_bytes(id)).copied().collect();
        let continued = String::from_utf8_lossy(&bytes);
        prop_assert_eq!(&run(Detokenizer::new(t.clone(), skip), &ids), &continued);
        let dropped = if kind == 1 { continued.strip_prefix(' ') } else { None };
        prop_assert_eq!(&whole, dropped.unwrap_or(&continued));

        // A prompt and what the model says after it, where no character is cut in two.
        let (prompt, output) = ids.split_at(cut.index(ids.len() + 1));
        let prompt = t.decode(prompt, skip);
        let output = run(Detokenizer::new(t.clone(), skip), output);
        if !whole.contains(char::REPLACEMENT_CHARACTER)
            && !output.contains(char::REPLACEMENT_CHARACTER)
            && !prompt.is_empty()
        {
            prop_assert_eq!(prompt + &output, whole);
        }
    }

    #[test]
    fn characters_come_whole_and_at_once(text in "[a👩é中\u{301}]{0,20}") {
        let t = Arc::new(fixture::tokenizer());
        let mut detokenizer = Detokenizer::new(t.clone(), true);
        let mut seen = String::new();
        let mut bytes = Vec::new();
        for id in t.encode(&text, false, false).unwrap() {
            bytes.extend_from_slice(t.token_bytes(id));
            seen.push_str(&detokenizer.push(id));
            let whole = match std::str::from_utf8(&bytes) {
                Ok(s) => s.len(),
                Err(e) => e.valid_up_to(),
            };
            prop_assert_eq!(seen.as_bytes(), &bytes[..whole]);
        }
        prop_assert_eq!(detokenizer.flush(), "");
    }
}

#[test]
fn shared_between_threads() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Tokenizer>();
    is_shared::<crate::ChatTemplate>();
    is_shared::<Detokenizer>();
    is_shared::<crate::StopMatcher>();
}
