//! Any vocabulary in GGUF's terms: an error or a tokenizer that can be used.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use spate_text::{Tokenizer, VocabSpec};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    sentencepiece: bool,
    /// SentencePiece needs them all.
    with_bytes: bool,
    pre: Option<&'a str>,
    tokens: Vec<(&'a str, u8, f32)>,
    merges: Vec<&'a str>,
    ids: [Option<u32>; 3],
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    add_space_prefix: Option<bool>,
    control_rstrip: bool,
    text: &'a str,
}

fuzz_target!(|input: Input| {
    let mut spec = VocabSpec {
        model: if input.sentencepiece { "llama" } else { "gpt2" }.into(),
        pre: input.pre.map(String::from),
        merges: input.merges.into_iter().map(String::from).collect(),
        bos: input.ids[0],
        eos: input.ids[1],
        eot: input.ids[2],
        add_bos: input.add_bos,
        add_eos: input.add_eos,
        add_space_prefix: input.add_space_prefix,
        control_rstrip: input.control_rstrip,
        ..VocabSpec::default()
    };
    if input.with_bytes {
        spec.tokens
            .extend((0..=255).map(|b: u8| format!("<0x{b:02X}>")));
        spec.token_types.extend([6; 256]);
        spec.scores.extend([0.0; 256]);
    }
    for (text, kind, score) in input.tokens {
        spec.tokens.push(text.into());
        spec.token_types.push(i32::from(kind % 7));
        spec.scores.push(score);
    }
    if let Ok(tokenizer) = Tokenizer::from_vocab(spec) {
        spate_fuzz::exercise(&Arc::new(tokenizer), input.text.as_bytes());
    }
});
