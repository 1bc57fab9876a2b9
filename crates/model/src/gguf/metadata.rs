use std::collections::HashMap;
use std::path::PathBuf;

use super::reader::Reader;
use crate::ModelError;

/// Arrays of arrays may nest this deep.
const MAX_DEPTH: u32 = 4;

/// One metadata value. Integers of all widths are one kind, and so are floats.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer type; `u64` values above `i64::MAX` are kept exactly.
    Int(i128),
    /// `f32` or `f64`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// UTF-8 text.
    Str(String),
    /// Elements of one type.
    Array(Array),
}

/// A metadata array. The common element types are stored compactly: a vocabulary has 10^5 entries.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Any integer type but `u64`.
    Ints(Vec<i64>),
    /// `f32` or `f64`.
    Floats(Vec<f64>),
    /// `bool`.
    Bools(Vec<bool>),
    /// UTF-8 text.
    Strs(Vec<String>),
    /// Arrays.
    Arrays(Vec<Array>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Int(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a bool",
            Value::Str(_) => "a string",
            Value::Array(Array::Ints(_)) => "an array of integers",
            Value::Array(Array::Floats(_)) => "an array of floats",
            Value::Array(Array::Bools(_)) => "an array of bools",
            Value::Array(Array::Strs(_)) => "an array of strings",
            Value::Array(Array::Arrays(_)) => "an array of arrays",
        }
    }
}

/// The key-value section of a GGUF file.
///
/// Getters return `None` for an absent key and an error for a value of another type.
#[derive(Debug)]
pub struct Metadata {
    file: PathBuf,
    values: HashMap<String, Value>,
}

macro_rules! getter {
    ($(#[$doc:meta])* $name:ident, $out:ty, $want:literal, $pattern:pat => $value:expr) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// When the value has another type or is out of range.
        pub fn $name(&self, key: &str) -> Result<Option<$out>, ModelError> {
            match self.values.get(key) {
                None => Ok(None),
                Some($pattern) => match $value {
                    Some(value) => Ok(Some(value)),
                    None => Err(self.error(format!("metadata `{key}` is out of the range of {}", $want))),
                },
                #[allow(unreachable_patterns)]
                Some(other) => {
                    Err(self.error(format!("metadata `{key}` is {}, expected {}", other.kind(), $want)))
                }
            }
        }
    };
}

impl Metadata {
    /// Any value as it is.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    getter!(/// A string.
        get_str, &str, "a string", Value::Str(s) => Some(s.as_str()));
    getter!(/// An integer.
        get_u32, u32, "a 32-bit unsigned integer", Value::Int(i) => u32::try_from(*i).ok());
    getter!(/// An integer.
        get_u64, u64, "a 64-bit unsigned integer", Value::Int(i) => u64::try_from(*i).ok());
    getter!(/// A finite float.
        get_f32, f32, "a finite 32-bit float", Value::Float(f) => Some(*f as f32).filter(|f| f.is_finite()));
    getter!(/// A truth value.
        get_bool, bool, "a bool", Value::Bool(b) => Some(*b));
    getter!(/// An array of strings.
        get_array_str, &[String], "an array of strings", Value::Array(Array::Strs(a)) => Some(a.as_slice()));
    getter!(/// An array of integers that fit in 32 bits.
        get_array_i32, Vec<i32>, "an array of 32-bit integers",
        Value::Array(Array::Ints(a)) => a.iter().map(|&i| i32::try_from(i).ok()).collect());
    getter!(/// An array of floats.
        get_array_f32, Vec<f32>, "an array of floats",
        Value::Array(Array::Floats(a)) => Some(a.iter().map(|&f| f as f32).collect()));

    fn error(&self, problem: String) -> ModelError {
        ModelError::Model {
            file: self.file.clone(),
            problem,
        }
    }

    pub(super) fn read(
        reader: &mut Reader,
        count: usize,
        file: PathBuf,
    ) -> Result<Self, ModelError> {
        let mut values = HashMap::new();
        for _ in 0..count {
            let at = reader.offset;
            let key = reader.string("metadata key")?;
            let kind = reader.u32("metadata type")?;
            let value = read_value(reader, kind)?;
            if values.contains_key(&key) {
                return Err(reader.error(at, format!("metadata key `{key}` appears twice")));
            }
            values.insert(key, value);
        }
        Ok(Self { file, values })
    }
}

/// GGUF's numbers for the value types.
mod kind {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STR: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}

fn read_value(r: &mut Reader, kind: u32) -> Result<Value, ModelError> {
    let what = "metadata value";
    Ok(match kind {
        kind::F32 | kind::F64 => Value::Float(read_float(r, kind)?),
        kind::BOOL => Value::Bool(read_bool(r)?),
        kind::STR => Value::Str(r.string(what)?),
        kind::ARRAY => Value::Array(read_array(r, 1)?),
        kind::U64 => Value::Int(r.u64(what)?.into()),
        _ => Value::Int(read_int(r, kind)?.into()),
    })
}

fn read_array(r: &mut Reader, depth: u32) -> Result<Array, ModelError> {
    let at = r.offset;
    let kind = r.u32("array type")?;
    let min_bytes = match kind {
        kind::U8 | kind::I8 | kind::BOOL => 1,
        kind::U16 | kind::I16 => 2,
        kind::U32 | kind::I32 | kind::F32 => 4,
        kind::U64 | kind::I64 | kind::F64 | kind::STR => 8,
        kind::ARRAY if depth < MAX_DEPTH => 12,
        kind::ARRAY => {
            return Err(r.error(at, format!("arrays nest deeper than {MAX_DEPTH} levels")));
        }
        _ => return Err(unknown_kind(r, at, kind)),
    };
    let count = r.count(min_bytes, "array length")?;
    let items = 0..count;
    Ok(match kind {
        kind::F32 | kind::F64 => Array::Floats(
            items
                .map(|_| read_float(r, kind))
                .collect::<Result<_, _>>()?,
        ),
        kind::BOOL => Array::Bools(items.map(|_| read_bool(r)).collect::<Result<_, _>>()?),
        kind::STR => Array::Strs(
            items
                .map(|_| r.string("array element"))
                .collect::<Result<_, _>>()?,
        ),
        kind::ARRAY => Array::Arrays(
            items
                .map(|_| read_array(r, depth + 1))
                .collect::<Result<_, _>>()?,
        ),
        _ => Array::Ints(items.map(|_| read_int(r, kind)).collect::<Result<_, _>>()?),
    })
}

fn read_int(r: &mut Reader, kind: u32) -> Result<i64, ModelError> {
    let what = "integer";
    let at = r.offset;
    Ok(match kind {
        kind::U8 => r.bytes::<1>(what)?[0].into(),
        kind::I8 => i8::from_le_bytes(r.bytes(what)?).into(),
        kind::U16 => u16::from_le_bytes(r.bytes(what)?).into(),
        kind::I16 => i16::from_le_bytes(r.bytes(what)?).into(),
        kind::U32 => u32::from_le_bytes(r.bytes(what)?).into(),
        kind::I32 => i32::from_le_bytes(r.bytes(what)?).into(),
        kind::I64 => i64::from_le_bytes(r.bytes(what)?),
        kind::U64 => i64::try_from(r.u64(what)?)
            .map_err(|_| r.error(at, "an array element is above 2^63 - 1"))?,
        _ => return Err(unknown_kind(r, at, kind)),
    })
}

fn read_float(r: &mut Reader, kind: u32) -> Result<f64, ModelError> {
    Ok(if kind == kind::F32 {
        f32::from_le_bytes(r.bytes("float")?).into()
    } else {
        f64::from_le_bytes(r.bytes("float")?)
    })
}

fn read_bool(r: &mut Reader) -> Result<bool, ModelError> {
    let at = r.offset;
    match r.bytes::<1>("bool")?[0] {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(r.error(at, format!("a bool is {other}"))),
    }
}

fn unknown_kind(r: &Reader, at: u64, kind: u32) -> ModelError {
    r.error(at, format!("unknown metadata type {kind}"))
}
