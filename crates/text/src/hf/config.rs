use serde::Deserialize;

use crate::TextError;

/// What of `tokenizer_config.json` is about tokens and templates.
#[derive(Deserialize, Default)]
pub(super) struct TokenizerConfig {
    #[serde(default)]
    bos_token: Option<TokenText>,
    #[serde(default)]
    eos_token: Option<TokenText>,
    pub(super) add_bos_token: Option<bool>,
    pub(super) add_eos_token: Option<bool>,
    chat_template: Option<Templates>,
}

/// A token's text, bare or with the flags of an added token.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Bare(String),
    WithFlags { content: String },
}

impl TokenText {
    fn text(&self) -> &str {
        match self {
            Self::Bare(text) | Self::WithFlags { content: text } => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl TokenizerConfig {
    pub(super) fn parse(json: &[u8]) -> Result<Self, TextError> {
        serde_json::from_slice(json).map_err(|e| problem(e.to_string()))
    }

    pub(super) fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_ref().map(TokenText::text)
    }

    pub(super) fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_ref().map(TokenText::text)
    }
}

fn problem(problem: String) -> TextError {
    TextError::File {
        file: "tokenizer_config.json",
        problem,
    }
}

/// The sources of a model's chat template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateSource {
    /// For any conversation.
    pub default: String,
    /// For conversations with tools, where the model has a template of its own for them.
    pub tool_use: Option<String>,
}

impl TemplateSource {
    /// One template for everything.
    pub fn new(default: impl Into<String>) -> Self {
        Self {
            default: default.into(),
            tool_use: None,
        }
    }

    /// Finds the template of a Hugging Face directory: the text of `chat_template.jinja` if there
    /// is such a file, or what `tokenizer_config.json` holds; `None` if neither has one.
    ///
    /// # Errors
    /// [`TextError::File`] if `tokenizer_config.json` is not JSON of the known form, or has named
    /// templates without one called `default`.
    pub fn find(
        tokenizer_config: Option<&[u8]>,
        chat_template_jinja: Option<&str>,
    ) -> Result<Option<Self>, TextError> {
        if let Some(source) = chat_template_jinja {
            return Ok(Some(Self::new(source)));
        }
        let config = tokenizer_config.map(TokenizerConfig::parse).transpose()?;
        match config.and_then(|c| c.chat_template) {
            None => Ok(None),
            Some(Templates::One(source)) => Ok(Some(Self::new(source))),
            Some(Templates::Named(named)) => {
                let source = |name| {
                    let template = named.iter().find(|t| t.name == name);
                    template.map(|t| t.template.clone())
                };
                let default = source("default").ok_or_else(|| {
                    problem("chat_template: no named template is called \"default\"".into())
                })?;
                Ok(Some(Self {
                    default,
                    tool_use: source("tool_use"),
                }))
            }
        }
    }
}
