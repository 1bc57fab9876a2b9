//! The kinds of rotary scaling that `config.json` files ask for.

use std::f64::consts::TAU;

use serde::Deserialize;

use crate::Rope;

/// `rope_scaling`, or `rope_parameters`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct RopeJson {
    rope_type: Option<String>,
    /// The old name of `rope_type`.
    #[serde(rename = "type")]
    old_type: Option<String>,
    pub(super) rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<u64>,
}

impl RopeJson {
    fn kind(&self) -> &str {
        let kind = self.rope_type.as_deref().or(self.old_type.as_deref());
        kind.unwrap_or("default")
    }

    /// What positions are divided by.
    pub(super) fn linear_factor(&self) -> Result<f32, String> {
        match self.kind() {
            "linear" => Ok(required("factor", self.factor)?),
            "default" | "llama3" => Ok(1.0),
            other => Err(format!("rope scaling `{other}` is not supported")),
        }
    }
}

/// What Llama 3's scaling divides each pair's frequency by: 1 for wavelengths that the original
/// context holds many times, `factor` for those that it holds less than once, and between them
/// what interpolates the frequency. `None` for other kinds of scaling.
pub(super) fn llama3_factors(json: &RopeJson, rope: &Rope) -> Result<Option<Vec<f32>>, String> {
    if json.kind() != "llama3" {
        return Ok(None);
    }
    let factor = f64::from(required("factor", json.factor)?);
    let low = required("low_freq_factor", json.low_freq_factor)?;
    let high = required("high_freq_factor", json.high_freq_factor)?;
    let context = required(
        "original_max_position_embeddings",
        json.original_max_position_embeddings,
    )? as f64;
    if !(factor > 0.0 && low > 0.0 && low < high && high.is_finite() && context > 0.0) {
        return Err(
            "rope scaling `llama3` needs a positive factor and 0 < low_freq_factor < \
                    high_freq_factor"
                .into(),
        );
    }
    let factors = (0..rope.dims / 2).map(|pair| {
        let exponent = 2.0 * pair as f64 / rope.dims as f64;
        let wavelength = TAU * f64::from(rope.base).powf(exponent);
        let turns = context / wavelength;
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    });
    Ok(Some(factors.collect()))
}

fn required<T>(name: &str, value: Option<T>) -> Result<T, String> {
    value.ok_or_else(|| format!("rope scaling: `{name}` is missing"))
}
