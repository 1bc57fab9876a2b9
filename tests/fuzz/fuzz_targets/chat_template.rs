//! Any template over any conversation: an error or text, never a crash, never a forged control
//! token. The input is the template, a zero byte, and a message.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use spate_text::{ChatTemplate, TemplateInput, Tokenizer, VocabSpec};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let spec = VocabSpec {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: vec!["<|im_start|>".into(), "<|im_end|>".into()],
        token_types: vec![3, 3],
        ..VocabSpec::default()
    };
    Tokenizer::from_vocab(spec).expect("a valid vocabulary")
});

fuzz_target!(|input: &str| {
    let (source, content) = input.split_once('\0').unwrap_or((input, "hello"));
    let Ok(template) = ChatTemplate::compile(source, &TOKENIZER) else {
        return;
    };
    let messages = json!([
        { "role": "system", "content": content },
        { "role": "user", "content": [{ "type": "text", "text": content }] },
    ]);
    let tools = json!([{ "type": "function", "function": { "name": content } }]);
    for (continue_final_message, tools) in [(false, None), (true, Some(&tools))] {
        let rendered = template.render(&TemplateInput {
            messages: &messages,
            tools,
            add_generation_prompt: !continue_final_message,
            continue_final_message,
            bos_token: "",
            eos_token: "",
            extra: None,
        });
        let Ok(rendered) = rendered else { continue };
        let tokens = TOKENIZER
            .encode_rendered(&rendered, false)
            .expect("shorter than 4 GiB");
        // Without an opener of its own a template can't begin a control token.
        if !source.contains('<') && !source.contains('\\') {
            assert!(tokens.is_empty(), "forged in {:?}", rendered.text);
        }
    }
});
