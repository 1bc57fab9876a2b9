use std::error::Error as _;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value as Json};

use crate::guard::{Guard, Marks, Rendered};
use crate::{TemplateSource, TextError, Tokenizer, python};

/// Steps of one rendering: some tenths of a second. Bounds time and memory.
const FUEL: u64 = 10_000_000;
/// Bytes that a rendering may make.
const MAX_OUTPUT: usize = 64 << 20;
/// Nested calls, so that a worker's stack of 2 MiB is enough.
const MAX_RECURSION: usize = 150;
/// Names of the templates in the environment.
const DEFAULT: &str = "chat_template";
const TOOL_USE: &str = "chat_template.tool_use";

/// A model's chat template, compiled.
///
/// Jinja as `transformers` sets it up: `trim_blocks`, `lstrip_blocks`, loop controls, Python's
/// string and dict methods, `tojson`, `raise_exception`, `strftime_now` (UTC here);
/// `{% generation %}` blocks render their content.
pub struct ChatTemplate {
    env: Environment<'static>,
    guard: Guard,
}

/// What a template is rendered with.
#[derive(Debug, Clone)]
pub struct TemplateInput<'a> {
    /// The conversation: an array of objects with `role` and `content`.
    pub messages: &'a Json,
    /// Tools in OpenAI's form; `None` is Python's `None` to the template.
    pub tools: Option<&'a Json>,
    /// End with the start of an assistant message.
    pub add_generation_prompt: bool,
    /// End right after the last message's content, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Text of the begin-of-sequence token; may become a control token.
    pub bos_token: &'a str,
    /// Text of the end-of-sequence token; may become a control token.
    pub eos_token: &'a str,
    /// Further variables (`chat_template_kwargs`).
    pub extra: Option<&'a Map<String, Json>>,
}

impl ChatTemplate {
    /// Compiles a template for use with one tokenizer, whose control tokens clients must not forge.
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`].
    pub fn compile(source: &str, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        Self::compile_all(&TemplateSource::new(source), tokenizer)
    }

    /// Compiles all templates of a model. [`Self::render`] takes the one for tools when there are
    /// tools.
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`].
    pub fn compile_all(source: &TemplateSource, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("these options do not conflict");
        let mut env = Environment::new();
        env.set_syntax(syntax);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_unknown_method_callback(unknown_method_callback);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(MAX_RECURSION);
        env.set_formatter(python::format);
        env.add_filter("tojson", python::tojson);
        env.add_filter("string", python::string);
        env.add_test("iterable", python::is_iterable);
        env.add_function("raise_exception", python::raise_exception);
        let tool_use = source.tool_use.as_deref();
        let sources = [
            (DEFAULT, Some(source.default.as_str())),
            (TOOL_USE, tool_use),
        ];
        for (name, source) in sources {
            let Some(source) = source else { continue };
            env.add_template_owned(name, without_generation_tags(source))
                .map_err(|e| TextError::TemplateSyntax(describe(&e)))?;
        }
        let all = [source.default.as_str(), tool_use.unwrap_or("")].join("\n");
        Ok(Self {
            env,
            guard: Guard::new(&all, tokenizer.guarded_texts()),
        })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`TextError::Template`]: the template raised an exception, could not work with the data, or
    /// took too long.
    pub fn render(&self, input: &TemplateInput) -> Result<Rendered, TextError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.render_at(input, now.map_or(0, |d| d.as_secs() as i64))
    }

    /// [`Self::render`] at a given time, in seconds since 1970.
    pub(crate) fn render_at(&self, input: &TemplateInput, now: i64) -> Result<Rendered, TextError> {
        if input.add_generation_prompt && input.continue_final_message {
            return Err(TextError::Template(
                "add_generation_prompt and continue_final_message exclude each other".into(),
            ));
        }
        let extra = Json::Object(input.extra.cloned().unwrap_or_default());
        let data = [input.messages, input.tools.unwrap_or(&Json::Null), &extra];
        let marks = self.guard.marks(&data)?;
        let context = context(input, &marks, now)?;
        let for_tools = input
            .tools
            .and_then(|_| self.env.get_template(TOOL_USE).ok());
        let template = for_tools
            .or_else(|| self.env.get_template(DEFAULT).ok())
            .expect("compile added the template");
        let mut out = LimitedOutput(Vec::new());
        template
            .render_captured_to(context, &mut out)
            .map_err(|e| TextError::Template(describe(&e)))?;
        let mut text = String::from_utf8(out.0).expect("minijinja writes whole strings");
        if input.continue_final_message {
            cut_at_end_mark(&mut text, marks.end)?;
        }
        Ok(marks.remove(&text))
    }
}

/// The variables of a rendering.
fn context(input: &TemplateInput, marks: &Marks, now: i64) -> Result<Value, TextError> {
    let messages = if input.continue_final_message {
        marks.value(&with_end_mark(input.messages, marks.end)?)
    } else {
        marks.value(input.messages)
    };
    let tools = input.tools.map_or(Value::from(()), |t| marks.value(t));
    let strftime_now = Value::from_function(move |format: &str| python::strftime(now, format));
    let own = [
        ("messages", messages),
        ("tools", tools),
        ("documents", Value::from(())),
        ("add_generation_prompt", input.add_generation_prompt.into()),
        ("bos_token", input.bos_token.into()),
        ("eos_token", input.eos_token.into()),
        ("strftime_now", strftime_now),
    ];
    let mut variables: Vec<(String, Value)> = own.map(|(k, v)| (k.into(), v)).into();
    for (name, value) in input.extra.into_iter().flatten() {
        match variables.iter_mut().find(|v| v.0 == *name) {
            Some((_, documents)) if name == "documents" => *documents = marks.value(value),
            Some(_) => {
                return Err(TextError::Template(format!(
                    "chat_template_kwargs cannot set {name:?}"
                )));
            }
            None => variables.push((name.clone(), marks.value(value))),
        }
    }
    Ok(Value::from_pairs(variables))
}

/// The messages with a mark, and a space as `transformers` has it, after the last one's text.
fn with_end_mark(messages: &Json, end: char) -> Result<Json, TextError> {
    let mut messages = messages.clone();
    let content = messages
        .as_array_mut()
        .and_then(|m| m.last_mut())
        .and_then(|m| m.get_mut("content"));
    let text = match content {
        Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|p| p.get_mut("text")),
        other => other,
    };
    let Some(Json::String(text)) = text else {
        return Err(TextError::Template(
            "continue_final_message: the last message has no text to continue".into(),
        ));
    };
    text.extend([end, ' ']);
    Ok(messages)
}

/// Ends the text where the final message's content ended. Where the template took the space after
/// the mark away it trims content, so it would have trimmed the space before the mark as well.
fn cut_at_end_mark(text: &mut String, end: char) -> Result<(), TextError> {
    let Some(at) = text.rfind(end) else {
        return Err(TextError::Template(
            "continue_final_message: the template does not show the last message".into(),
        ));
    };
    let trimmed = !text[at + end.len_utf8()..].starts_with(' ');
    text.truncate(at);
    if trimmed {
        text.truncate(text.trim_end().len());
    }
    // A template may show the content more than once.
    text.retain(|c| c != end);
    Ok(())
}

/// Makes blocks that do nothing of `{% generation %}` blocks (`transformers` uses them to tell the
/// assistant's tokens in training), so that the whitespace around them is treated as before.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        // Behind the opener: in `{%}` the two share a character.
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let inside = &tag[2..end];
        let name = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        };
        out.push_str("{%");
        out.push_str(&inside.replacen(name, replacement, 1));
        out.push_str("%}");
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}

/// An error's message for the client: what the template raised, or what went wrong and in which
/// line of the template.
fn describe(error: &Error) -> String {
    let mut source = error.source();
    while let Some(e) = source {
        if let Some(raised) = e.downcast_ref::<python::Raised>() {
            return raised.0.clone();
        }
        source = e.source();
    }
    let line = error
        .line()
        .map_or(String::new(), |n| format!(" (line {n})"));
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("rendering takes too many steps{line}");
    }
    match error.detail() {
        Some(detail) => format!("{}: {detail}{line}", error.kind()),
        None => format!("{}{line}", error.kind()),
    }
}

/// Collects output up to [`MAX_OUTPUT`].
struct LimitedOutput(Vec<u8>);

impl io::Write for LimitedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other("the rendered text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
