#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use serde_json::{Map, Value as Json};

use crate::{ChatTemplate, TemplateInput, TextError, fixture};

/// 2026-11-23 12:00 UTC, when the corpus was made.
const CORPUS_TIME: i64 = 1_795_435_200;

fn input<'a>(messages: &'a Json, extra: Option<&'a Map<String, Json>>) -> TemplateInput<'a> {
    TemplateInput {
        messages,
        tools: None,
        add_generation_prompt: false,
        continue_final_message: false,
        bos_token: "<s>",
        eos_token: "</s>",
        extra,
    }
}

/// `$SPATE_SHARED/data/…`, or `shared/data/…` beside the repository.
fn shared_data(file: &str) -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let shared = std::env::var_os("SPATE_SHARED").map_or(root.join("../shared"), PathBuf::from);
    let path = shared.join("data").join(file);
    path.exists().then_some(path)
}

/// Renders one case of the corpus.
fn render_case(case: &Json) -> Result<String, TextError> {
    let Json::Object(mut data) = case["data"].clone() else {
        panic!("data is an object");
    };
    let messages = data.remove("messages").unwrap();
    let tools = data.remove("tools");
    let mut text = |name| match data.remove(name) {
        Some(Json::String(s)) => s,
        _ => String::new(),
    };
    let (bos_token, eos_token) = (text("bos_token"), text("eos_token"));
    let add_generation_prompt = data.remove("add_generation_prompt") == Some(Json::Bool(true));
    let input = TemplateInput {
        messages: &messages,
        tools: tools.as_ref().filter(|t| !t.is_null()),
        add_generation_prompt,
        continue_final_message: false,
        bos_token: &bos_token,
        eos_token: &eos_token,
        extra: Some(&data),
    };
    let source = case["template"].as_str().unwrap();
    let template = ChatTemplate::compile(source, &fixture::tokenizer())?;
    Ok(template.render_at(&input, CORPUS_TIME)?.text)
}

#[test]
fn corpus_of_real_templates_renders_as_transformers_does() {
    let Some(path) = shared_data("chat-templates.jsonl") else {
        eprintln!("skipped: no shared/data/chat-templates.jsonl (set SPATE_SHARED)");
        return;
    };
    let cases = std::fs::read_to_string(path).unwrap();
    let (mut total, mut wrong) = (0, Vec::new());
    for line in cases.lines() {
        let case: Json = serde_json::from_str(line).unwrap();
        total += 1;
        let got = render_case(&case);
        let as_expected = match (&got, &case["expect"]) {
            (Ok(text), Json::String(expect)) => text == expect,
            (Err(_), Json::Null) => true,
            _ => false,
        };
        if !as_expected {
            let (expect, error) = (&case["expect"], &case["err"]);
            wrong.push(format!(
                "{} [{}]\n  want {expect} {error}\n  got  {got:?}",
                case["name"], case["ctx"]
            ));
        }
    }
    assert!(total > 0, "the corpus is empty");
    assert!(wrong.is_empty(), "{} of {total} differ:\n{}", wrong.len(), wrong.join("\n"));
}
