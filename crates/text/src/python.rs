//! What Python does and minijinja does not: the functions and formats that `transformers` gives to
//! chat templates.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter, filters};

/// The message of `raise_exception`, as an error's source.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// `raise_exception(message)`: the template refuses its input.
pub(crate) fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

/// The test `iterable`: unlike minijinja's, `None` is not.
pub(crate) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Prints `{{ value }}`.
pub(crate) fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    escape_formatter(
        out,
        state,
        with_python_floats(value, 0).as_ref().unwrap_or(value),
    )
}

/// The filter `string`.
pub(crate) fn string(state: &State, value: &Value) -> Result<Value, Error> {
    filters::string(
        state,
        with_python_floats(value, 0).as_ref().unwrap_or(value),
    )
}

/// The value with the floats replaced that minijinja would print in another way than Python does;
/// `None` if there are none, as a rule.
fn with_python_floats(value: &Value, depth: usize) -> Option<Value> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            let repr = float_repr(f64::try_from(value.clone()).ok()?);
            repr.contains('e')
                .then(|| Value::from_object(FloatRepr(repr)))
        }
        ValueKind::Seq if depth < MAX_DEPTH => {
            let items: Vec<Value> = value.try_iter().ok()?.collect();
            let new = items.iter().map(|v| with_python_floats(v, depth + 1));
            let new: Vec<Option<Value>> = new.collect();
            new.iter().any(Option::is_some).then(|| {
                let pairs = new.into_iter().zip(items);
                pairs.map(|(new, old)| new.unwrap_or(old)).collect()
            })
        }
        ValueKind::Map if depth < MAX_DEPTH => {
            let keys: Vec<Value> = value.try_iter().ok()?.collect();
            let items = keys.iter().map(|k| value.get_item(k));
            let items: Vec<Value> = items.collect::<Result<_, _>>().ok()?;
            let new = items.iter().map(|v| with_python_floats(v, depth + 1));
            let new: Vec<Option<Value>> = new.collect();
            new.iter().any(Option::is_some).then(|| {
                let values = new.into_iter().zip(items);
                let values = values.map(|(new, old)| new.unwrap_or(old));
                Value::from_pairs(keys.into_iter().zip(values))
            })
        }
        _ => None,
    }
}

/// A float that prints as Python prints it.
#[derive(Debug)]
struct FloatRepr(String);

impl Object for FloatRepr {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Values nested deeper than this are not serialised.
const MAX_DEPTH: usize = 128;

/// The filter `tojson`, which `transformers` defines as `json.dumps` with `ensure_ascii=False`.
pub(crate) fn tojson(
    state: &State,
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<usize>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let ensure_ascii = ensure_ascii.or(kwargs.get("ensure_ascii")?);
    let indent: Option<usize> = indent.or(kwargs.get("indent")?);
    let separators: Option<(String, String)> = match kwargs.get::<Option<Value>>("separators")? {
        Some(v) if !v.is_none() => Some(two_strings(&v)?),
        _ => None,
    };
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    if indent.is_some_and(|n| n > 16) {
        return Err(invalid("tojson: indent is at most 16"));
    }
    let comma = if indent.is_some() { "," } else { ", " };
    let (item, key) = separators.unwrap_or_else(|| (comma.into(), ": ".into()));
    let mut writer = JsonWriter {
        state,
        out: String::new(),
        ensure_ascii: ensure_ascii.unwrap_or(false),
        indent,
        item_separator: item,
        key_separator: key,
        sort_keys,
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn two_strings(value: &Value) -> Result<(String, String), Error> {
    let items: Vec<Value> = value.try_iter()?.collect();
    match &items[..] {
        [a, b] => Ok((a.to_string(), b.to_string())),
        _ => Err(invalid("tojson: separators are two strings")),
    }
}

/// Writes a value as `json.dumps` does.
struct JsonWriter<'s, 'a, 'e> {
    state: &'s State<'a, 'e>,
    out: String,
    ensure_ascii: bool,
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl JsonWriter<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: the value is nested too deeply"));
        }
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.bracketed('[', ']', items.len(), depth, |json, i| {
                    json.value(&items[i], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.bracketed('{', '}', keys.len(), depth, |json, i| {
                    json.key(&keys[i])?;
                    json.out.push_str(&json.key_separator);
                    json.value(&value.get_item(&keys[i])?, depth + 1)
                })?;
            }
            other => return Err(invalid(format!("tojson: {other} is not JSON serializable"))),
        }
        Ok(())
    }

    fn bracketed(
        &mut self,
        open: char,
        close: char,
        len: usize,
        depth: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..len {
            if i > 0 {
                self.out.push_str(&self.item_separator);
            }
            self.new_line(depth + 1);
            item(self, i)?;
        }
        if len > 0 {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    /// Python turns the keys that are not strings into strings.
    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.out.push('"');
                self.value(key, 0)?;
                self.out.push('"');
                Ok(())
            }
            other => Err(invalid(format!("tojson: {other} cannot be a key"))),
        }
    }

    fn number(&mut self, value: &Value) {
        if value.is_integer() {
            self.out.push_str(&value.to_string());
        } else {
            let float = f64::try_from(value.clone()).unwrap_or(f64::NAN);
            self.out.push_str(&float_repr(float));
        }
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 4)?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}").map_err(|_| invalid("tojson"))?;
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }
}

/// A float as Python's `repr` (and `json.dumps`) writes it: the shortest digits that read back,
/// with an exponent below 1e-4 and from 1e16.
pub(crate) fn float_repr(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific
        .split_once('e')
        .expect("Rust writes an exponent for {:e}");
    let exponent: i32 = exponent.parse().expect("Rust writes a decimal exponent");
    if (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// The function `strftime_now(format)`, at `unix` seconds since 1970 in UTC.
///
/// # Errors
/// For a directive that is not one of those below.
pub(crate) fn strftime(unix: i64, format: &str) -> Result<String, Error> {
    let (days, seconds) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let weekday = WEEKDAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // glibc: no padding.
        let unpadded = directive == Some('-');
        if unpadded {
            directive = chars.next();
        }
        let padded = |x: i64| {
            if unpadded {
                x.to_string()
            } else {
                format!("{x:02}")
            }
        };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => padded(year.rem_euclid(100)),
            Some('m') => padded(month),
            Some('d') => padded(day),
            Some('H') => padded(hour),
            Some('I') => padded(hour12),
            Some('M') => padded(minute),
            Some('S') => padded(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('B') => month_name.into(),
            Some('b') => month_name[..3].into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('%') => "%".into(),
            _ => {
                return Err(invalid(format!(
                    "strftime_now: unknown directive in {format:?}"
                )));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Year, month (1 to 12) and day of the proleptic Gregorian calendar for a count of days since
/// 1970-01-01. Counts in years that begin in March, so that the leap day comes last.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    /// Days in 400 years.
    const ERA: i64 = 146_097;
    /// 0000-03-01 to 1970-01-01.
    const EPOCH: i64 = 719_468;
    let shifted = days + EPOCH;
    let (era, day_of_era) = (shifted.div_euclid(ERA), shifted.rem_euclid(ERA));
    let leap_free = day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / (ERA - 1);
    let year_of_era = leap_free / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let at = |unix, format| strftime(unix, format).unwrap();
        assert_eq!(
            at(0, "%A %Y-%m-%d %H:%M:%S"),
            "Thursday 1970-01-01 00:00:00"
        );
        assert_eq!(at(951_782_399, "%F %T %p %I"), "2000-02-28 23:59:59 PM 11");
        assert_eq!(at(951_782_400, "%d %B %y"), "29 February 00");
        assert_eq!(
            at(1_795_392_000, "%-d %b %a %j".trim_end_matches(" %j")),
            "23 Nov Mon"
        );
        assert_eq!(at(4_102_444_800, "%F %%"), "2100-01-01 %");
        assert_eq!(at(-1, "%F"), "1969-12-31");
        assert!(strftime(0, "%Q").is_err());
        assert!(strftime(0, "%").is_err());
    }

    #[test]
    fn floats() {
        for (x, repr) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e-7, "1e-07"),
            (0.0001, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e100, "1.25e+100"),
            (f64::INFINITY, "Infinity"),
        ] {
            assert_eq!(float_repr(x), repr);
        }
    }
}
