//! Settings that mean different things on different devices.

use std::fmt;

use super::Settings;
use super::units::parse_number;

/// What is asked to run the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// The first GPU if it can be used, else the CPU.
    Auto,
    Cpu,
    /// The GPU of this number.
    Cuda(u32),
}

impl Device {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:") {
                Some(number) => parse_number(number, 0, 63).map(|n| Self::Cuda(n as u32)),
                None => Err(format!("'{text}' is not auto, cpu, cuda or cuda:N")),
            },
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// How prompts and running streams share a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overlap {
    /// One queue: prompts are cut into chunks that ride along with the streams' steps.
    Off,
    /// Long prompts have a queue of their own, of lower priority.
    Streams,
    /// As `Streams`, and this many SMs are kept for the streams' steps.
    DecodeSms(u32),
}

impl Overlap {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "streams" => Ok(Self::Streams),
            _ => match text.strip_prefix("decode_sms=") {
                Some(number) => parse_number(number, 8, 512).map(|n| Self::DecodeSms(n as u32)),
                None => Err(format!(
                    "'{text}' is not auto, off, streams or decode_sms=N"
                )),
            },
        }
    }
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Streams => f.write_str("streams"),
            Self::DecodeSms(sms) => write!(f, "decode_sms={sms}"),
        }
    }
}

/// The sizes of what serves, once it is known on what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) max_num_seqs: u32,
    pub(crate) max_num_batched_tokens: u32,
    pub(crate) block_size: u32,
    /// `None`: what the device has left.
    pub(crate) kv_cache_memory: Option<u64>,
}

impl Sizes {
    /// What `auto` stands for on a CPU: a step of it takes about as long as a stream should wait.
    const CPU: Self = Self {
        max_num_seqs: 64,
        max_num_batched_tokens: 512,
        block_size: 16,
        kv_cache_memory: Some(1 << 30),
    };

    /// And on a GPU, which needs many tokens at once to be busy.
    const GPU: Self = Self {
        max_num_seqs: 256,
        max_num_batched_tokens: 8192,
        block_size: 16,
        kv_cache_memory: None,
    };

    pub(crate) fn on_cpu(settings: &Settings) -> Self {
        Self::CPU.with(settings)
    }

    pub(crate) fn on_gpu(settings: &Settings) -> Self {
        Self::GPU.with(settings)
    }

    /// What was set, else these. One `auto` gives way to what was set beside it, so that a step has
    /// room for a token of each sequence.
    fn with(self, s: &Settings) -> Self {
        let seqs = s.max_num_seqs.unwrap_or_else(|| {
            let most = s.max_num_batched_tokens.unwrap_or(u32::MAX);
            self.max_num_seqs.min(most)
        });
        let tokens = s.max_num_batched_tokens;
        Self {
            max_num_seqs: seqs,
            max_num_batched_tokens: tokens.unwrap_or(self.max_num_batched_tokens.max(seqs)),
            block_size: s.block_size.unwrap_or(self.block_size),
            kv_cache_memory: s.kv_cache_memory.or(self.kv_cache_memory),
        }
    }
}
