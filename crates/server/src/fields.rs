//! Typed, range-checked access to the fields of a request object.
//!
//! Each accessor takes its field out of the object, so that what is left at the end was unknown.
//! `null` means absent, as OpenAI's clients send it.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::errors::ApiError;

/// The fields of one request that have not been read yet.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    pub(crate) fn new(map: Map<String, Value>) -> Self {
        Self(map)
    }

    /// Takes a field; `None` when it is absent or null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.swap_remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(v)),
            Some(other) => Err(wrong_type(name, "true or false", &other)),
        }
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(v)) => Ok(Some(v)),
            Some(other) => Err(wrong_type(name, "an object", &other)),
        }
    }

    pub(crate) fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(v)) => Ok(Some(v)),
            Some(other) => Err(wrong_type(name, "an array", &other)),
        }
    }

    /// An integer within `range`.
    pub(crate) fn integer<T>(
        &mut self,
        name: &str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, ApiError>
    where
        T: TryFrom<i128> + Into<i128> + Copy + Display,
    {
        self.take(name)
            .map(|value| integer(name, &value, range))
            .transpose()
    }

    /// A number within `range`.
    pub(crate) fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        self.take(name)
            .map(|value| number(name, &value, range))
            .transpose()
    }

    /// Reads a known field whose behaviour does not exist here: only its default passes.
    pub(crate) fn only_default(
        &mut self,
        name: &str,
        is_default: impl FnOnce(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !is_default(&value) => Err(ApiError::unsupported(name)),
            _ => Ok(()),
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    /// Ends the reading: what is left is unknown, and ignored as OpenAI's servers do.
    pub(crate) fn log_unknown(&self) {
        for name in self.0.keys() {
            tracing::debug!(field = %name.escape_debug(), "unknown field ignored");
        }
    }
}

/// Reads an integer within `range`. A number with an empty fraction counts as one.
pub(crate) fn integer<T>(name: &str, value: &Value, range: RangeInclusive<T>) -> Result<T, ApiError>
where
    T: TryFrom<i128> + Into<i128> + Copy + Display,
{
    let Value::Number(number) = value else {
        return Err(wrong_type(name, "an integer", value));
    };
    let whole = match (number.as_i128(), number.as_f64()) {
        (Some(whole), _) => Some(whole),
        // The cast saturates, and what saturates is out of every range.
        (None, Some(float)) if float.fract() == 0.0 => Some(float as i128),
        _ => None,
    };
    let Some(whole) = whole else {
        return Err(wrong_type(name, "an integer", value));
    };
    let (low, high) = (*range.start(), *range.end());
    if whole < low.into() || whole > high.into() {
        return Err(out_of_range(name, low, high, value));
    }
    T::try_from(whole).map_err(|_| out_of_range(name, low, high, value))
}

/// Reads a number within `range`.
pub(crate) fn number(
    name: &str,
    value: &Value,
    range: RangeInclusive<f32>,
) -> Result<f32, ApiError> {
    let Some(number) = value.as_f64() else {
        return Err(wrong_type(name, "a number", value));
    };
    let single = number as f32;
    if !range.contains(&single) {
        return Err(out_of_range(name, range.start(), range.end(), value));
    }
    Ok(single)
}

/// 400: the value has another JSON type.
pub(crate) fn wrong_type(name: &str, expected: &str, value: &Value) -> ApiError {
    let got = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    let got = match value {
        Value::Number(number) => format!("the number {number}"),
        _ => got.to_owned(),
    };
    ApiError::field(name, format!("'{name}' must be {expected}, got {got}"))
}

fn out_of_range(name: &str, low: impl Display, high: impl Display, value: &Value) -> ApiError {
    ApiError::field(
        name,
        format!("'{name}' must be between {low} and {high}, got {value}"),
    )
}
