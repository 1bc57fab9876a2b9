//! Strict JSON: what two parsers could read differently is refused.
//!
//! One pass over the bytes. On top of what `serde_json` refuses by itself (nesting beyond 128, bad
//! UTF-8, lone surrogates, NaN and numbers beyond a double, trailing text), an object that has a key
//! twice is an error. An error names the top-level field that it is in.

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::errors::ApiError;

/// Parses a request body, which has to be one JSON object.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let field = RefCell::new(None);
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    let root = Strict {
        field: Some(&field),
    };
    let parsed = root
        .deserialize(&mut parser)
        .and_then(|value| parser.end().map(|()| value));
    match parsed {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::bad_request(
            "the request body must be a JSON object",
        )),
        Err(e) => Err(ApiError {
            param: field.into_inner(),
            ..ApiError::bad_request(format!("the request body is not valid JSON: {e}"))
        }),
    }
}

/// Reads one value. At the top level it notes the field being read.
struct Strict<'a> {
    field: Option<&'a RefCell<Option<String>>>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v)
            .map(Value::Number)
            .ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(Strict { field: None })? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if let Some(field) = self.field {
                *field.borrow_mut() = Some(key.clone());
            }
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!(
                    "key '{}' occurs twice",
                    key.escape_debug()
                )));
            }
            let value = entries.next_value_seed(Strict { field: None })?;
            map.insert(key, value);
            if let Some(field) = self.field {
                *field.borrow_mut() = None;
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn error(body: &[u8]) -> ApiError {
        parse_object(body).unwrap_err()
    }

    #[test]
    fn reads_what_serde_json_reads() {
        let body =
            br#" {"a": [1, -2, 0.5, 1e3, true, null, "\u00e9\ud83d\ude00"], "b": {"c": {}}} "#;
        let expected: Value = serde_json::from_slice(body).unwrap();
        assert_eq!(Value::Object(parse_object(body).unwrap()), expected);
    }

    #[test]
    fn h7_refuses_duplicate_keys_at_any_depth() {
        assert_eq!(error(br#"{"n": 1, "n": 2}"#).param.as_deref(), Some("n"));
        let nested = error(br#"{"x": [{"a": 1, "\u0061": 2}]}"#);
        assert!(nested.message.contains("'a' occurs twice"), "{nested:?}");
        assert_eq!(nested.param.as_deref(), Some("x"));
    }

    #[test]
    fn h5_refuses_deep_nesting_without_recursing() {
        let deep = [b"{\"a\":".as_slice(), &b"[".repeat(100_000)].concat();
        assert!(error(&deep).message.contains("recursion limit"));
    }

    #[test]
    fn h6_refuses_bad_utf8_and_lone_surrogates() {
        error(b"{\"a\": \"\xff\"}");
        error(b"{\"a\": \"\xed\xa0\x80\"}");
        error(br#"{"a": "\ud800"}"#);
        error(br#"{"a": "\udc00\ud800"}"#);
    }

    #[test]
    fn names_the_field_of_a_number_that_is_none() {
        for number in ["NaN", "Infinity", "-Infinity", "1e999", "01"] {
            let e = error(format!(r#"{{"a": 1, "temperature": {number}}}"#).as_bytes());
            assert_eq!(e.param.as_deref(), Some("temperature"), "{number}");
        }
    }

    #[test]
    fn refuses_what_is_not_one_object() {
        for body in ["", "[]", "1", "{} {}", "{\"a\":1", "{\"a\":1,}"] {
            error(body.as_bytes());
        }
    }
}
