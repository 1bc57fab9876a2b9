//! What every generation endpoint shares: the one [`ValidatedRequest`] and the checks that make it.
//!
//! Everything that depends on no tokenizing is checked here. A known field that asks for something
//! that does not exist here is an error; an unknown field is ignored.

use std::sync::Arc;

use serde_json::{Map, Value};
use spate_types::{SamplingParams, TokenId};

use crate::app::{Context, random_u64};
use crate::errors::ApiError;
use crate::fields::{self, Fields, wrong_type};

const MAX_TOP_LOGPROBS: u32 = 20;
const MAX_LOGIT_BIAS: usize = 1024;
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_IDS: usize = 1024;
const MAX_CACHE_SALT_CHARS: usize = 1024;
/// Beyond any context length; keeps sums of token counts far from overflow.
const MAX_TOKENS: u32 = i32::MAX as u32;

/// A generation request that is known to be good up to the length of its prompt.
#[derive(Debug)]
pub(crate) struct ValidatedRequest {
    /// The name by which the client asked for the model, told back in the response.
    pub(crate) model: String,
    /// At least one.
    pub(crate) prompts: Vec<Prompt>,
    /// Complete but for `min_tokens_banned`.
    pub(crate) sampling: SamplingParams,
    pub(crate) ignore_eos: bool,
    pub(crate) stop_ids: Vec<TokenId>,
    pub(crate) stop_strings: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special_tokens: bool,
    /// `None`: as many as the context has room for.
    pub(crate) max_tokens: Option<MaxTokens>,
    /// Sequences per prompt.
    pub(crate) n: u32,
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<Arc<str>>,
    pub(crate) stream: Option<StreamOptions>,
    pub(crate) output: OutputOptions,
    /// `request_id`, for logs and the response header; never a key.
    pub(crate) client_id: Option<String>,
}

/// What to continue.
#[derive(Debug)]
pub(crate) enum Prompt {
    Text {
        text: String,
        add_special_tokens: bool,
    },
    Tokens(Vec<TokenId>),
    Chat(ChatPrompt),
}

/// A conversation, to be rendered by the model's template.
#[derive(Debug)]
pub(crate) struct ChatPrompt {
    /// An array of messages in the form that templates expect.
    pub(crate) messages: Value,
    pub(crate) add_generation_prompt: bool,
    pub(crate) continue_final_message: bool,
    pub(crate) add_special_tokens: bool,
    pub(crate) template_kwargs: Option<Map<String, Value>>,
}

/// A limit on output tokens and where it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MaxTokens {
    pub(crate) limit: u32,
    /// The field that set it; `None` for the endpoint's default, which yields to the context length.
    pub(crate) field: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StreamOptions {
    /// One last chunk with the usage.
    pub(crate) include_usage: bool,
    /// The usage so far in every chunk.
    pub(crate) continuous_usage: bool,
}

/// What to put into the response besides text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct OutputOptions {
    pub(crate) token_ids: bool,
    /// Write tokens in logprobs as `token_id:ID` instead of their text.
    pub(crate) tokens_as_ids: bool,
    /// Begin the text with the prompt; completions only.
    pub(crate) echo: bool,
}

/// `logprobs` in the wire's two dialects.
pub(crate) enum LogprobsField {
    /// `logprobs: bool` and `top_logprobs: 0..=20`.
    Chat,
    /// `logprobs: 0..=20`.
    Completions,
}

impl ValidatedRequest {
    /// Reads the fields that the endpoints share; the other arguments are what the endpoint read.
    pub(crate) fn read(
        fields: &mut Fields,
        context: &Context,
        prompts: Vec<Prompt>,
        max_tokens: Option<MaxTokens>,
        logprobs: LogprobsField,
    ) -> Result<Self, ApiError> {
        let model = context.model.resolve_name(fields.string("model")?)?;
        let stream = read_stream(fields)?;
        let n = read_n(fields, context, prompts.len())?;
        let sampling = read_sampling(fields, context, logprobs)?;
        if stream.is_some() && sampling.prompt_logprobs.is_some() {
            return Err(ApiError::field(
                "prompt_logprobs",
                "'prompt_logprobs' is not available with 'stream'",
            ));
        }
        refuse_unsupported(fields)?;
        let request = Self {
            model,
            prompts,
            sampling,
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            stop_ids: read_stop_ids(fields, context.model.vocab_size())?,
            stop_strings: read_stop_strings(fields)?,
            include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
            max_tokens,
            n,
            priority: fields
                .integer("priority", i32::MIN..=i32::MAX)?
                .unwrap_or(0),
            cache_salt: read_cache_salt(fields)?,
            stream,
            output: OutputOptions {
                token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
                tokens_as_ids: fields.bool("return_tokens_as_token_ids")?.unwrap_or(false),
                echo: false,
            },
            client_id: fields.string("request_id")?,
        };
        Ok(request)
    }
}

/// Reads one of the fields that limit the output.
pub(crate) fn read_max_tokens(
    fields: &mut Fields,
    name: &'static str,
) -> Result<Option<MaxTokens>, ApiError> {
    let limit = fields.integer(name, 1..=MAX_TOKENS)?;
    Ok(limit.map(|limit| MaxTokens {
        limit,
        field: Some(name),
    }))
}

fn read_stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    if options.is_some() && !stream {
        return Err(ApiError::field(
            "stream_options",
            "'stream_options' is only allowed when 'stream' is true",
        ));
    }
    if !stream {
        return Ok(None);
    }
    let mut options = Fields::new(options.unwrap_or_default());
    let mut flag = |name: &str| -> Result<bool, ApiError> {
        let flag = options.bool(name).map_err(|e| ApiError {
            param: Some("stream_options".into()),
            ..e
        })?;
        Ok(flag.unwrap_or(false))
    };
    let continuous_usage = flag("continuous_usage_stats")?;
    Ok(Some(StreamOptions {
        include_usage: flag("include_usage")? || continuous_usage,
        continuous_usage,
    }))
}

fn read_n(fields: &mut Fields, context: &Context, prompts: usize) -> Result<u32, ApiError> {
    let n = fields
        .integer("n", 1..=context.app.config.max_n)?
        .unwrap_or(1);
    if let Some(best_of) = fields.integer("best_of", 1..=context.app.config.max_n)?
        && best_of != n
    {
        return Err(ApiError::field(
            "best_of",
            "'best_of' other than 'n' is not supported yet",
        ));
    }
    let most = context.model.max_sequences();
    if prompts as u64 * u64::from(n) > u64::from(most) {
        return Err(ApiError::field(
            "n",
            format!(
                "{prompts} prompts with 'n' = {n} are more than the {most} sequences that this server takes at once"
            ),
        ));
    }
    Ok(n)
}

fn read_sampling(
    fields: &mut Fields,
    context: &Context,
    logprobs: LogprobsField,
) -> Result<SamplingParams, ApiError> {
    let defaults = &context.model.defaults;
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(defaults.top_p);
    if top_p <= 0.0 {
        return Err(ApiError::field(
            "top_p",
            "'top_p' must be above 0 and at most 1, got 0",
        ));
    }
    // -1 is vLLM's spelling of "all".
    let top_k = fields.integer("top_k", -1..=i32::MAX)?;
    let min_tokens = fields.integer("min_tokens", 0..=MAX_TOKENS)?.unwrap_or(0);
    Ok(SamplingParams {
        temperature: fields
            .number("temperature", 0.0..=2.0)?
            .unwrap_or(defaults.temperature),
        top_k: top_k.map_or(defaults.top_k, |k| u32::try_from(k).unwrap_or(0)),
        top_p,
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=10.0)?
            .unwrap_or(1.0),
        presence_penalty: fields
            .number("presence_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        logit_bias: read_logit_bias(fields, context.model.vocab_size())?,
        seed: fields
            .integer("seed", i64::MIN..=i64::MAX)?
            .map_or_else(random_u64, |seed| seed as u64),
        logprobs: read_logprobs(fields, logprobs)?,
        prompt_logprobs: fields.integer("prompt_logprobs", 0..=MAX_TOP_LOGPROBS)?,
        min_tokens_banned: Vec::new(),
        min_tokens,
    })
}

fn read_logprobs(fields: &mut Fields, dialect: LogprobsField) -> Result<Option<u32>, ApiError> {
    match dialect {
        LogprobsField::Completions => fields.integer("logprobs", 0..=MAX_TOP_LOGPROBS),
        LogprobsField::Chat => {
            let wanted = fields.bool("logprobs")?.unwrap_or(false);
            let top = fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
            if top.is_some_and(|k| k > 0) && !wanted {
                return Err(ApiError::field(
                    "top_logprobs",
                    "'top_logprobs' is only allowed when 'logprobs' is true",
                ));
            }
            Ok(wanted.then(|| top.unwrap_or(0)))
        }
    }
}

fn read_logit_bias(fields: &mut Fields, vocab_size: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    const NAME: &str = "logit_bias";
    let map = fields.object(NAME)?.unwrap_or_default();
    if map.len() > MAX_LOGIT_BIAS {
        return Err(ApiError::field(
            NAME,
            format!(
                "'{NAME}' may have {MAX_LOGIT_BIAS} entries, got {}",
                map.len()
            ),
        ));
    }
    let mut bias = Vec::with_capacity(map.len());
    for (key, value) in &map {
        // Digits only: "+1" or "01" would let two keys name one token.
        let id = key
            .parse::<TokenId>()
            .ok()
            .filter(|id| id.to_string() == *key);
        let Some(id) = id.filter(|&id| id < vocab_size) else {
            return Err(ApiError::field(
                NAME,
                format!(
                    "the keys of '{NAME}' must be token ids between 0 and {}",
                    vocab_size - 1
                ),
            ));
        };
        bias.push((id, fields::number(NAME, value, -100.0..=100.0)?));
    }
    Ok(bias)
}

fn read_stop_ids(fields: &mut Fields, vocab_size: u32) -> Result<Vec<TokenId>, ApiError> {
    const NAME: &str = "stop_token_ids";
    let ids = fields.array(NAME)?.unwrap_or_default();
    if ids.len() > MAX_STOP_IDS {
        return Err(ApiError::field(
            NAME,
            format!(
                "'{NAME}' may have {MAX_STOP_IDS} entries, got {}",
                ids.len()
            ),
        ));
    }
    ids.iter()
        .map(|id| fields::integer(NAME, id, 0..=vocab_size - 1))
        .collect()
}

fn read_stop_strings(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "stop";
    let stops = match fields.take(NAME) {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    if stops.len() > MAX_STOP_STRINGS {
        return Err(ApiError::field(
            NAME,
            format!(
                "'{NAME}' may have {MAX_STOP_STRINGS} strings, got {}",
                stops.len()
            ),
        ));
    }
    stops
        .into_iter()
        .map(|stop| match stop {
            Value::String(s) if (1..=MAX_STOP_BYTES).contains(&s.len()) => Ok(s),
            Value::String(s) => Err(ApiError::field(
                NAME,
                format!(
                    "each string of '{NAME}' must have 1 to {MAX_STOP_BYTES} bytes, got {}",
                    s.len()
                ),
            )),
            other => Err(wrong_type(NAME, "a string or an array of strings", &other)),
        })
        .collect()
}

fn read_cache_salt(fields: &mut Fields) -> Result<Option<Arc<str>>, ApiError> {
    const NAME: &str = "cache_salt";
    let Some(salt) = fields.string(NAME)? else {
        return Ok(None);
    };
    let chars = salt.chars().count();
    if chars == 0 || chars > MAX_CACHE_SALT_CHARS || salt.chars().any(char::is_control) {
        return Err(ApiError::field(
            NAME,
            format!(
                "'{NAME}' must have 1 to {MAX_CACHE_SALT_CHARS} characters, none of them a control character"
            ),
        ));
    }
    Ok(Some(salt.into()))
}

/// Fields of OpenAI and vLLM that both generation endpoints know and whose behaviour does not exist
/// here: their defaults pass, anything else is an error that names them.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let is_false = |v: &Value| *v == Value::Bool(false);
    for name in [
        "allowed_token_ids",
        "bad_words",
        "guided_choice",
        "guided_decoding_backend",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "guided_whitespace_pattern",
        "kv_transfer_params",
        "logits_processors",
        "logprob_token_ids",
        "structured_outputs",
        "truncate_prompt_tokens",
        "vllm_xargs",
    ] {
        fields.only_default(name, |v| v.as_array().is_some_and(Vec::is_empty))?;
    }
    fields.only_default("use_beam_search", is_false)?;
    fields.only_default("length_penalty", |v| v.as_f64() == Some(1.0))?;
    fields.only_default("spaces_between_special_tokens", |v| *v == Value::Bool(true))?;
    read_response_format(fields)?;
    // Accepted and without effect: notes for whoever stores or bills requests.
    for name in [
        "metadata",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    ] {
        fields.take(name);
    }
    Ok(())
}

fn read_response_format(fields: &mut Fields) -> Result<(), ApiError> {
    const NAME: &str = "response_format";
    let Some(format) = fields.object(NAME)? else {
        return Ok(());
    };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(()),
        Some("json_object" | "json_schema" | "structural_tag") => Err(ApiError::unsupported(NAME)),
        _ => Err(ApiError::field(
            NAME,
            "'response_format.type' must be one of 'text', 'json_object', 'json_schema'",
        )),
    }
}
