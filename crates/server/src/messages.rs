//! Chat messages: from what clients send to what templates expect.

use serde_json::{Map, Value};

use crate::errors::ApiError;
use crate::fields::{Fields, wrong_type};

const MAX_MESSAGES: usize = 4096;
const MAX_CONTENT_PARTS: usize = 4096;
const MAX_TOOLS: usize = 1024;

/// Checks a `messages` array and gives it the form that templates expect: content as one string,
/// `developer` as `system` (templates know no other name for it), arguments of tool calls as objects.
pub(crate) fn read_messages(fields: &mut Fields) -> Result<Value, ApiError> {
    let Some(messages) = fields.array("messages")? else {
        return Err(ApiError::field("messages", "'messages' is required"));
    };
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        return Err(ApiError::field(
            "messages",
            format!(
                "'messages' must have 1 to {MAX_MESSAGES} entries, got {}",
                messages.len()
            ),
        ));
    }
    let mut parts_left = MAX_CONTENT_PARTS;
    messages
        .into_iter()
        .enumerate()
        .map(|(i, message)| read_message(&format!("messages[{i}]"), message, &mut parts_left))
        .collect::<Result<Vec<_>, _>>()
        .map(Value::Array)
}

fn read_message(path: &str, message: Value, parts_left: &mut usize) -> Result<Value, ApiError> {
    let Value::Object(mut message) = message else {
        return Err(wrong_type(path, "an object", &message));
    };
    let mut out = Map::new();
    let role = match message.swap_remove("role") {
        Some(Value::String(role)) => role,
        other => {
            let path = format!("{path}.role");
            return Err(wrong_type(&path, "a string", &other.unwrap_or_default()));
        }
    };
    let role = match role.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        _ => {
            return Err(ApiError::field(
                format!("{path}.role"),
                format!(
                    "'{path}.role' must be one of 'system', 'developer', 'user', 'assistant', 'tool'"
                ),
            ));
        }
    };
    out.insert("role".into(), role.into());

    let tool_calls = read_tool_calls(path, message.swap_remove("tool_calls"))?;
    let content = read_content(path, message.swap_remove("content"), parts_left)?;
    // Only an assistant may say nothing: it called a tool, or its turn is to be continued.
    let content = match content {
        Some(content) => content,
        None if role == "assistant" => String::new(),
        None => {
            return Err(ApiError::field(
                format!("{path}.content"),
                format!("'{path}.content' is required"),
            ));
        }
    };
    out.insert("content".into(), content.into());
    if let Some(calls) = tool_calls.filter(|_| role == "assistant") {
        out.insert("tool_calls".into(), calls);
    }
    for name in ["name", "tool_call_id"] {
        match message.swap_remove(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => {
                out.insert(name.into(), text.into());
            }
            Some(other) => return Err(wrong_type(&format!("{path}.{name}"), "a string", &other)),
        }
    }
    Ok(Value::Object(out))
}

/// Content as text; the parts of an array are joined by line breaks.
fn read_content(
    path: &str,
    content: Option<Value>,
    parts_left: &mut usize,
) -> Result<Option<String>, ApiError> {
    let path = format!("{path}.content");
    let parts = match content {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) => parts,
        Some(other) => {
            return Err(wrong_type(&path, "a string or an array of parts", &other));
        }
    };
    *parts_left = parts_left.checked_sub(parts.len()).ok_or_else(|| {
        ApiError::field(
            &*path,
            format!("'messages' may have {MAX_CONTENT_PARTS} content parts in all"),
        )
    })?;
    let texts = parts
        .into_iter()
        .enumerate()
        .map(|(i, part)| read_part(&format!("{path}[{i}]"), part))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Some(texts.join("\n")))
}

fn read_part(path: &str, part: Value) -> Result<String, ApiError> {
    let mut part = match part {
        Value::String(text) => return Ok(text),
        Value::Object(part) => part,
        other => return Err(wrong_type(path, "an object", &other)),
    };
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
    match kind {
        "text" | "refusal" => {
            let field = kind.to_owned();
            match part.swap_remove(&field) {
                Some(Value::String(text)) => Ok(text),
                other => Err(wrong_type(
                    &format!("{path}.{field}"),
                    "a string",
                    &other.unwrap_or_default(),
                )),
            }
        }
        "image_url" | "input_audio" | "audio_url" | "video_url" | "file" | "file_url" => {
            Err(ApiError::field(
                path,
                format!(
                    "'{path}': content of type '{kind}' is not supported, this model reads text only"
                ),
            ))
        }
        _ => Err(ApiError::field(
            path,
            format!("'{path}.type' must be 'text'"),
        )),
    }
}

/// Calls that the model made earlier. On the wire their arguments are JSON in a string; templates
/// expect the object.
fn read_tool_calls(path: &str, calls: Option<Value>) -> Result<Option<Value>, ApiError> {
    let path = format!("{path}.tool_calls");
    let mut calls = match calls {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(wrong_type(&path, "an array", &other)),
    };
    for (i, call) in calls.iter_mut().enumerate() {
        let path = format!("{path}[{i}].function");
        let function = call.get_mut("function").and_then(Value::as_object_mut);
        let Some(function) = function.filter(|f| f.get("name").is_some_and(Value::is_string))
        else {
            return Err(ApiError::field(
                &*path,
                format!("'{path}' must be an object with a 'name' and 'arguments'"),
            ));
        };
        let arguments = match function.get("arguments") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::String(text)) if text.is_empty() => Map::new(),
            Some(Value::Object(map)) => map.clone(),
            Some(Value::String(text)) => {
                crate::json::parse_object(text.as_bytes()).map_err(|_| {
                    ApiError::field(
                        format!("{path}.arguments"),
                        format!("'{path}.arguments' must be a JSON object in a string"),
                    )
                })?
            }
            Some(other) => return Err(wrong_type(&format!("{path}.arguments"), "a string", other)),
        };
        function.insert("arguments".into(), Value::Object(arguments));
    }
    Ok((!calls.is_empty()).then_some(Value::Array(calls)))
}

/// `tools` and `tool_choice`: well-formed, and of no effect. A request whose tools the model could
/// call is refused, because its calls would not be parsed.
pub(crate) fn read_tools(fields: &mut Fields) -> Result<(), ApiError> {
    let tools = fields.array("tools")?.unwrap_or_default();
    let choice = fields.take("tool_choice");
    fields.bool("parallel_tool_calls")?;
    if tools.len() > MAX_TOOLS {
        return Err(ApiError::field(
            "tools",
            format!("'tools' may have {MAX_TOOLS} entries, got {}", tools.len()),
        ));
    }
    let mut names = std::collections::HashSet::new();
    for (i, tool) in tools.iter().enumerate() {
        let name = tool.pointer("/function/name").and_then(Value::as_str);
        let Some(name) = name else {
            return Err(ApiError::field(
                "tools",
                format!("'tools[{i}].function.name' must be a string"),
            ));
        };
        if !names.insert(name) {
            return Err(ApiError::field(
                "tools",
                format!("'tools[{i}].function.name' names an earlier tool again"),
            ));
        }
    }
    match &choice {
        Some(Value::String(choice)) if choice == "none" => Ok(()),
        Some(Value::String(choice)) if choice == "auto" => refuse_unless_empty(&tools, "tools"),
        None => refuse_unless_empty(&tools, "tools"),
        Some(Value::String(choice)) if choice == "required" => {
            Err(ApiError::unsupported("tool_choice"))
        }
        Some(Value::Object(_)) => Err(ApiError::unsupported("tool_choice")),
        Some(_) => Err(ApiError::field(
            "tool_choice",
            "'tool_choice' must be 'none', 'auto', 'required' or an object that names a function",
        )),
    }
}

fn refuse_unless_empty(tools: &[Value], name: &str) -> Result<(), ApiError> {
    if tools.is_empty() {
        Ok(())
    } else {
        Err(ApiError::unsupported(name))
    }
}
