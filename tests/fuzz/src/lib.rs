//! What targets share.

use std::sync::Arc;

use spate_text::{Detokenizer, Tokenizer};

/// Uses a tokenizer: encodes text, decodes it and arbitrary ids, in one go and in pieces.
pub fn exercise(tokenizer: &Arc<Tokenizer>, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let bound = tokenizer.vocab_size() as u32;
    let mut ids = Vec::new();
    for (add, parse) in [(false, false), (true, true)] {
        ids = tokenizer
            .encode(&text, add, parse)
            .expect("shorter than 4 GiB");
        assert!(
            ids.iter().all(|&id| id < bound),
            "an id outside the vocabulary"
        );
    }
    let arbitrary = bytes.iter().map(|&b| u32::from(b) * bound / 250);
    ids.extend(arbitrary);
    for skip in [false, true] {
        let whole = tokenizer.decode(&ids, skip);
        let mut detokenizer = Detokenizer::at_start(tokenizer.clone(), skip);
        let mut pieces: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push_str(&detokenizer.flush());
        assert_eq!(whole, pieces);
    }
}
