//! What is sent: prompts of random tokens with a common beginning, and when.

use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

/// A length: fixed (`512`) or uniform between two bounds (`256..768`, both included).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Length {
    min: u32,
    max: u32,
}

impl Length {
    /// The average.
    pub(crate) fn mean(self) -> f64 {
        f64::from(self.min) / 2.0 + f64::from(self.max) / 2.0
    }
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        match (min.parse(), max.parse()) {
            (Ok(min), Ok(max)) if 1 <= min && min <= max && max <= 1 << 24 => Ok(Self { min, max }),
            _ => Err(format!("'{text}' is not a length such as 512 or 256..768")),
        }
    }
}

impl std::fmt::Display for Length {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.min == self.max {
            true => write!(f, "{}", self.min),
            false => write!(f, "{}..{}", self.min, self.max),
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, seeded, the same everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `min ..= max`; the bias of the modulo is below 2^-32 for 32-bit spans.
    fn within(&mut self, min: u32, max: u32) -> u32 {
        min + (self.next() % (u64::from(max - min) + 1)) as u32
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// The gap to the next arrival of a Poisson process.
    pub(crate) fn gap(&mut self, rate: f64) -> Duration {
        Duration::from_secs_f64(-self.unit().ln() / rate)
    }
}

/// Ids of prompt tokens. Below lie the special tokens of some models, above those of others; every
/// vocabulary of the last years reaches further.
const TOKEN_IDS: std::ops::RangeInclusive<u32> = 1_000..=29_999;

/// Words that are one token each in common vocabularies, for servers that take no ids.
const WORDS: [&str; 32] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "number", "night", "point", "home",
];

/// What every request has in common.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) model: String,
    pub(crate) prompt_len: Length,
    pub(crate) output_len: Length,
    /// Share of the mean prompt that is one common beginning, in 0 ..= 1.
    pub(crate) shared_prefix: f64,
    /// Send words, not token ids: the prompt lengths are then approximate.
    pub(crate) text_prompts: bool,
    pub(crate) seed: u64,
}

impl Workload {
    /// The body of request number `index`: a function of the seed and the index alone.
    pub(crate) fn body(&self, index: u64) -> Bytes {
        // Streams of different requests must not overlap: each starts from a hashed seed.
        let mut random = Random::new(Random::new(self.seed ^ index.wrapping_mul(0x2545_f491_4f6c_dd1d)).next());
        let prompt_len = random.within(self.prompt_len.min, self.prompt_len.max);
        let output_len = random.within(self.output_len.min, self.output_len.max);
        let shared = (self.shared_prefix * self.prompt_len.mean()) as u32;

        let mut common = Random::new(self.seed ^ 0x5eed);
        let ids = (0..prompt_len).map(|i| {
            let source = if i < shared { &mut common } else { &mut random };
            source.within(*TOKEN_IDS.start(), *TOKEN_IDS.end())
        });
        let prompt: Value = match self.text_prompts {
            false => ids.collect::<Vec<u32>>().into(),
            true => {
                let words: Vec<&str> = ids.map(|id| WORDS[id as usize % WORDS.len()]).collect();
                words.join(" ").into()
            }
        };
        let body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_len,
            "min_tokens": output_len,
            "ignore_eos": true,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        });
        Bytes::from(body.to_string())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn prompt(workload: &Workload, index: u64) -> Vec<u64> {
        let body: Value = serde_json::from_slice(&workload.body(index)).unwrap();
        body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    }

    fn workload() -> Workload {
        Workload {
            model: "m".into(),
            prompt_len: "80..120".parse().unwrap(),
            output_len: "16".parse().unwrap(),
            shared_prefix: 0.5,
            text_prompts: false,
            seed: 7,
        }
    }

    #[test]
    fn lengths() {
        for text in ["0", "", "5..4", "-1", "a", "1..", "99999999"] {
            assert!(text.parse::<Length>().is_err(), "{text}");
        }
        assert_eq!("256..768".parse::<Length>().unwrap().mean(), 512.0);
    }

    #[test]
    fn prompts_share_their_beginning_and_nothing_else() {
        let (a, b) = (prompt(&workload(), 0), prompt(&workload(), 1));
        let common = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
        assert_eq!(common, 50);
        assert!(a.iter().all(|id| (1_000..30_000).contains(id)));
        assert!((80..=120).contains(&a.len()));
    }

    #[test]
    fn a_seed_repeats_and_another_does_not() {
        assert_eq!(workload().body(3), workload().body(3));
        let other = Workload { seed: 8, ..workload() };
        assert_ne!(prompt(&workload(), 3), prompt(&other, 3));
    }

    #[test]
    fn arrivals_have_the_rate_that_was_asked_for() {
        let mut random = Random::new(1);
        let total: Duration = (0..10_000).map(|_| random.gap(4.0)).sum();
        let mean = total.as_secs_f64() / 10_000.0;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
    }
}
