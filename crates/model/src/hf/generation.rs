use serde::Deserialize;

/// What a model's authors recommend for sampling (`generation_config.json`), and the tokens that end
/// its output.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// In 0 ..= 2.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps all tokens.
    pub top_k: Option<u32>,
    /// Beside those that the tokenizer knows.
    pub eos_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Json {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    eos_token_id: Option<Ids>,
}

/// One id or several.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "eos_token_id is neither a token id nor an array of them"
)]
pub(super) enum Ids {
    One(u32),
    Several(Vec<u32>),
}

impl Ids {
    pub(super) fn into_vec(self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Several(ids) => ids,
        }
    }
}

impl GenerationDefaults {
    /// Reads `generation_config.json`. Keys that only other programs' samplers know are none of
    /// ours: the file recommends, a request decides.
    pub(super) fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let json: Json = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let refuse = |name: &str, value: f32, allowed: &str| {
            Err(format!("{name} is {value}, allowed is {allowed}"))
        };
        match json {
            Json {
                temperature: Some(t),
                ..
            } if !(0.0..=2.0).contains(&t) => refuse("temperature", t, "0 to 2"),
            Json { top_p: Some(p), .. } if !(p > 0.0 && p <= 1.0) => {
                refuse("top_p", p, "above 0 and up to 1")
            }
            json => Ok(Self {
                temperature: json.temperature,
                top_p: json.top_p,
                top_k: json.top_k,
                eos_ids: json.eos_token_id.map_or_else(Vec::new, Ids::into_vec),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_end_or_several() {
        let read = |text: &str| GenerationDefaults::from_json(text.as_bytes());
        let one = read(r#"{"eos_token_id": 2, "do_sample": true, "temperature": 0.6}"#).unwrap();
        assert_eq!((one.eos_ids, one.temperature), (vec![2], Some(0.6)));
        let two = read(r#"{"eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95}"#).unwrap();
        assert_eq!((two.eos_ids, two.top_k), (vec![1, 106], Some(64)));
        assert_eq!(read("{}").unwrap(), GenerationDefaults::default());
        for (text, why) in [
            (r#"{"temperature": 3}"#, "temperature is 3"),
            (r#"{"top_p": 0}"#, "top_p is 0"),
            (r#"{"top_k": -1}"#, "`-1`, expected u32"),
            (r#"{"eos_token_id": "x"}"#, "neither a token id"),
            ("[", "EOF"),
        ] {
            let refused = read(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }
}
