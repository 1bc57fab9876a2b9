//! What is sent: prompts of random tokens with a common beginning.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;
use serde::{Serialize, Serializer};

/// A length: fixed (`512`) or uniform between two bounds (`256..768`, both included).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Length {
    min: u32,
    max: u32,
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        match (min.parse(), max.parse()) {
            (Ok(min), Ok(max)) if 1 <= min && min <= max && max <= 1 << 24 => Ok(Self { min, max }),
            _ => Err("a length is a number such as 512, or a spread such as 256..768".into()),
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.min == self.max {
            true => write!(f, "{}", self.min),
            false => write!(f, "{}..{}", self.min, self.max),
        }
    }
}

impl Serialize for Length {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How much of their beginning prompts have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum SharedPrefix {
    Tokens(u32),
    /// Of each prompt's own length, 0 to 100.
    Percent(f64),
}

impl SharedPrefix {
    /// # Errors
    /// The prefix is longer than a prompt may be.
    pub(super) fn check(self, prompts: Length) -> Result<()> {
        match self {
            Self::Tokens(tokens) if tokens > prompts.min => bail!(
                "--shared-prefix {tokens} does not fit into prompts of {prompts} tokens: \
                 --prompt-len counts the prefix, too"
            ),
            _ => Ok(()),
        }
    }

    fn of(self, prompt_len: u32) -> u32 {
        match self {
            Self::Tokens(tokens) => tokens,
            Self::Percent(percent) => (f64::from(prompt_len) * percent / 100.0) as u32,
        }
    }
}

impl FromStr for SharedPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = match text.strip_suffix('%') {
            None => text.parse().ok().map(Self::Tokens),
            Some(percent) => {
                let percent = percent.parse().ok();
                percent
                    .filter(|p| (0.0..=100.0).contains(p))
                    .map(Self::Percent)
            }
        };
        parsed.ok_or_else(|| "a number of tokens such as 2048, or a percentage such as 50%".into())
    }
}

impl fmt::Display for SharedPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokens(tokens) => write!(f, "{tokens}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Serialize for SharedPrefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, seeded, the same everywhere.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
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
    pub(super) fn gap(&mut self, rate: f64) -> Duration {
        Duration::from_secs_f64(-self.unit().ln() / rate)
    }
}

/// Words that are one token each in common vocabularies, for servers that take no ids.
const WORDS: [&str; 32] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part", "place",
    "case", "week", "company", "system", "program", "question", "work", "number", "night", "point",
    "home",
];

/// What the requests of a run are made of.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Workload {
    pub(super) model: String,
    pub(super) prompt_len: Length,
    pub(super) output_len: Length,
    pub(super) shared_prefix: SharedPrefix,
    /// Share of the requests that begin with the prefix, in 0 ..= 1.
    pub(super) shared_share: f64,
    /// Token ids are below this.
    pub(super) vocab: u32,
    /// Send words, not token ids.
    pub(super) text_prompts: bool,
    pub(super) seed: u64,
}

/// A request, ready to be sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    pub(super) body: Bytes,
    pub(super) output_len: u32,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Prompt {
    Tokens(Vec<u32>),
    Text(String),
}

#[derive(Serialize)]
struct CompletionRequest<'a> {
    model: &'a str,
    prompt: Prompt,
    max_tokens: u32,
    min_tokens: u32,
    ignore_eos: bool,
    temperature: f32,
    stream: bool,
    stream_options: StreamOptions,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

impl Workload {
    /// Request `number`: a function of the settings and the number alone, so that a run sends the
    /// same requests whatever order the answers come in.
    pub(super) fn request(&self, number: u64) -> Planned {
        // Streams of different requests must not overlap: each starts from a hashed seed.
        let seed = self.seed ^ number.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let mut own = Random::new(Random::new(seed).next());
        let mut common = Random::new(self.seed ^ 0x5eed);

        let prompt_len = own.within(self.prompt_len.min, self.prompt_len.max);
        let output_len = own.within(self.output_len.min, self.output_len.max);
        let shared = match self.shares(number) {
            true => self.shared_prefix.of(prompt_len),
            false => 0,
        };

        // The lowest ids are special tokens in most vocabularies.
        let (lowest, highest) = ((self.vocab / 10).min(1_000), self.vocab - 1);
        let ids = (0..prompt_len).map(|i| {
            let source = if i < shared { &mut common } else { &mut own };
            source.within(lowest, highest)
        });
        let prompt = match self.text_prompts {
            false => Prompt::Tokens(ids.collect()),
            true => {
                let words: Vec<&str> = ids.map(|id| WORDS[id as usize % WORDS.len()]).collect();
                Prompt::Text(words.join(" "))
            }
        };
        let request = CompletionRequest {
            model: &self.model,
            prompt,
            max_tokens: output_len,
            min_tokens: output_len,
            ignore_eos: true,
            temperature: 0.0,
            stream: true,
            stream_options: StreamOptions {
                include_usage: true,
            },
        };
        let body = serde_json::to_vec(&request).expect("strings and numbers always serialise");
        Planned {
            body: body.into(),
            output_len,
        }
    }

    /// Whether a request begins with the prefix. Of any that follow one another the right share does: drawn
    /// by lot, 80 % of 384 came out as 74 %, which is another workload.
    fn shares(&self, number: u64) -> bool {
        let so_far = |requests: u64| (requests as f64 * self.shared_share).floor();
        so_far(number + 1) > so_far(number)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} tokens in", self.model, self.prompt_len)?;
        if !matches!(self.shared_prefix, SharedPrefix::Tokens(0)) && self.shared_share > 0.0 {
            let (prefix, percent) = (self.shared_prefix, self.shared_share * 100.0);
            write!(
                f,
                " ({prefix} of them shared by {percent} % of the requests)"
            )?;
        }
        write!(f, ", {} out, seed {}", self.output_len, self.seed)
    }
}

#[cfg(test)]
impl Workload {
    pub(super) fn for_tests() -> Self {
        Self {
            model: "m".into(),
            prompt_len: Length { min: 80, max: 120 },
            output_len: Length { min: 16, max: 16 },
            shared_prefix: SharedPrefix::Tokens(50),
            shared_share: 1.0,
            vocab: 30_000,
            text_prompts: false,
            seed: 7,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::Value;

    fn prompt(workload: &Workload, number: u64) -> Vec<u64> {
        let body: Value = serde_json::from_slice(&workload.request(number).body).unwrap();
        let ids = body["prompt"].as_array().unwrap().iter();
        ids.map(|id| id.as_u64().unwrap()).collect()
    }

    fn common_len(a: &[u64], b: &[u64]) -> usize {
        a.iter().zip(b).take_while(|(x, y)| x == y).count()
    }

    #[test]
    fn lengths() {
        for text in ["0", "", "5..4", "-1", "a", "1..", "99999999"] {
            assert!(text.parse::<Length>().is_err(), "{text}");
        }
        for text in ["512", "256..768"] {
            assert_eq!(text.parse::<Length>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn prefixes() {
        for text in ["", "-1", "101%", "NaN%", "%", "0.5"] {
            assert!(text.parse::<SharedPrefix>().is_err(), "{text}");
        }
        for (text, tokens) in [("20", 20), ("25%", 25), ("100%", 100), ("0", 0)] {
            assert_eq!(text.parse::<SharedPrefix>().unwrap().of(100), tokens);
        }
        let prompts = Length { min: 80, max: 120 };
        assert!(SharedPrefix::Tokens(80).check(prompts).is_ok());
        assert!(SharedPrefix::Tokens(81).check(prompts).is_err());
    }

    #[test]
    fn prompts_share_their_beginning_and_nothing_else() {
        let workload = Workload::for_tests();
        let (a, b) = (prompt(&workload, 0), prompt(&workload, 1));
        assert_eq!(common_len(&a, &b), 50);
        assert!(a.iter().all(|id| (1_000..30_000).contains(id)));
        assert!((80..=120).contains(&a.len()));
    }

    #[test]
    fn as_many_requests_share_as_were_asked_for() {
        let workload = Workload {
            shared_share: 0.8,
            ..Workload::for_tests()
        };
        let prefix = prompt(&Workload::for_tests(), 0)[..50].to_vec();
        for first in [0, 3, 1 << 40] {
            let some = first..first + 100;
            let sharing = some.filter(|&i| common_len(&prompt(&workload, i), &prefix) == 50);
            assert!((79..=81).contains(&sharing.count()));
        }
        let none = Workload {
            shared_share: 0.0,
            ..workload
        };
        assert!((0..100).all(|i| common_len(&prompt(&none, i), &prefix) < 3));
    }

    #[test]
    fn ids_stay_within_a_small_vocabulary() {
        let workload = Workload {
            vocab: 16,
            ..Workload::for_tests()
        };
        assert!(prompt(&workload, 0).iter().all(|id| (1..16).contains(id)));
    }

    #[test]
    fn a_seed_repeats_and_another_does_not() {
        let workload = Workload::for_tests();
        assert_eq!(workload.request(3), workload.request(3));
        let other = Workload {
            seed: 8,
            ..workload.clone()
        };
        assert_ne!(prompt(&workload, 3), prompt(&other, 3));
    }

    #[test]
    fn text_prompts_have_one_word_a_token() {
        let workload = Workload {
            text_prompts: true,
            ..Workload::for_tests()
        };
        let body: Value = serde_json::from_slice(&workload.request(0).body).unwrap();
        let words = body["prompt"].as_str().unwrap().split(' ').count();
        assert_eq!(words, prompt(&Workload::for_tests(), 0).len());
    }

    #[test]
    fn arrivals_have_the_rate_and_spread_of_a_poisson_process() {
        let mut random = Random::new(1);
        let gaps: Vec<f64> = (0..10_000).map(|_| random.gap(4.0).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / 10_000.0;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
        // Exponential gaps: the standard deviation equals the mean.
        assert!((variance.sqrt() - 0.25).abs() < 0.02, "{variance}");
    }
}
