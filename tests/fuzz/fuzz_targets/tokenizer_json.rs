//! Any bytes as `tokenizer.json` and `tokenizer_config.json`, with a zero byte between: an error or
//! a tokenizer that can be used.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use spate_text::{ChatTemplate, TemplateSource, Tokenizer};

fuzz_target!(|bytes: &[u8]| {
    let [tokenizer, config] = spate_fuzz::parts(bytes);
    let config = Some(config).filter(|c| !c.is_empty());
    let template = TemplateSource::find(config, None);
    let Ok(tokenizer) = Tokenizer::from_tokenizer_json(tokenizer, config) else {
        return;
    };
    if let Ok(Some(source)) = template {
        let _ = ChatTemplate::compile_all(&source, &tokenizer);
    }
    spate_fuzz::exercise(&Arc::new(tokenizer), bytes);
});
