//! The kinds of rotary scaling that `config.json` files ask for.

use serde::Deserialize;

use crate::RopeScaling;
use crate::rope::{long_rope_magnitude, yarn_magnitude};

/// `rope_scaling`, or `rope_parameters`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct RopeJson {
    rope_type: Option<String>,
    /// The old name of `rope_type`.
    #[serde(rename = "type")]
    old_type: Option<String>,
    pub(super) rope_theta: Option<f32>,
    pub(super) partial_rotary_factor: Option<f32>,
    factor: Option<f32>,
    attention_factor: Option<f32>,
    original_max_position_embeddings: Option<u64>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    beta_fast: Option<f32>,
    beta_slow: Option<f32>,
    mscale: Option<f32>,
    truncate: Option<bool>,
    short_factor: Option<Vec<f32>>,
    long_factor: Option<Vec<f32>>,
}

/// `rope_parameters`: one for all layers, or one for each kind of layer.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "rope_parameters has values of wrong types")]
pub(super) enum RopesJson {
    ByKind {
        full_attention: Box<RopeJson>,
        sliding_attention: Box<RopeJson>,
    },
    Same(Box<RopeJson>),
}

impl RopesJson {
    pub(super) fn global(&self) -> &RopeJson {
        match self {
            RopesJson::ByKind { full_attention, .. } => full_attention,
            RopesJson::Same(rope) => rope,
        }
    }

    /// Of layers with a sliding window, where they have their own.
    pub(super) fn local(&self) -> Option<&RopeJson> {
        match self {
            RopesJson::ByKind {
                sliding_attention, ..
            } => Some(sliding_attention),
            RopesJson::Same(_) => None,
        }
    }
}

impl RopeJson {
    /// For a model of `context` positions; `original` is what `config.json` says beside the scaling
    /// about the context of the first training.
    pub(super) fn scaling(
        &self,
        context: usize,
        original: Option<u64>,
    ) -> Result<RopeScaling, String> {
        let factor = || required("factor", self.factor);
        let original = self.original_max_position_embeddings.or(original);
        let original = original.map(|n| n.min(u32::MAX.into()) as usize);
        let kind = self.rope_type.as_deref().or(self.old_type.as_deref());
        match kind.unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: required("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: required("high_freq_factor", self.high_freq_factor)?,
                original_context: required("original_max_position_embeddings", original)?,
            }),
            "yarn" if self.mscale.is_some() || self.truncate == Some(false) => {
                Err("rope scaling `yarn`: `mscale` and `truncate` are not supported".into())
            }
            "yarn" => Ok(RopeScaling::Yarn {
                factor: factor()?,
                beta_fast: self.beta_fast.unwrap_or(32.0),
                beta_slow: self.beta_slow.unwrap_or(1.0),
                original_context: original.unwrap_or(context),
                magnitude: match self.attention_factor {
                    Some(magnitude) => magnitude,
                    None => yarn_magnitude(factor()?),
                },
            }),
            // The old name.
            "longrope" | "su" => {
                let original_context = required("original_max_position_embeddings", original)?;
                let usual = long_rope_magnitude(context, original_context);
                Ok(RopeScaling::LongRope {
                    short: required("short_factor", self.short_factor.clone())?,
                    long: required("long_factor", self.long_factor.clone())?,
                    original_context,
                    magnitude: self.attention_factor.unwrap_or(usual),
                })
            }
            other => Err(format!(
                "rope scaling `{other}` is not supported; supported: linear, llama3, yarn, longrope"
            )),
        }
    }
}

fn required<T>(name: &str, value: Option<T>) -> Result<T, String> {
    value.ok_or_else(|| format!("rope scaling: `{name}` is missing"))
}
