//! Any bytes as `tokenizer.json` and `tokenizer_config.json`, with a zero byte between: an error or
//! a tokenizer that can be used.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use spate_text::{ChatTemplate, TemplateSource, Tokenizer};

fuzz_target!(|bytes: &[u8]| {
    let mut files = bytes.splitn(2, |&b| b == 0);
    let (tokenizer, config) = (files.next().unwrap_or_default(), files.next());
    let template = TemplateSource::find(config, None);
    let Ok(tokenizer) = Tokenizer::from_tokenizer_json(tokenizer, config) else {
        return;
    };
    if let Ok(Some(source)) = template {
        let _ = ChatTemplate::compile_all(&source, &tokenizer);
    }
    spate_fuzz::exercise(&Arc::new(tokenizer), bytes);
});
