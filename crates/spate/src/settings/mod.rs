//! Settings: one struct, filled from a TOML file, the environment and the command line, later ones
//! first. Every name is checked, and each value knows where it came from.

mod device;
mod flags;
mod suggest;
mod table;
pub(crate) mod units;

pub(crate) use device::{Device, Overlap, Sizes};
pub(crate) use flags::SettingFlags;
pub(crate) use suggest::nearest;
pub(crate) use table::{SETTINGS, Setting};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use table::ENV_PREFIX;

/// Everything that can be set. The table in `table.rs` has a line of help for each.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) model: String,
    pub(crate) load_format: LoadFormat,
    pub(crate) served_model_name: Vec<String>,
    pub(crate) chat_template: Option<PathBuf>,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) api_key: Vec<String>,
    pub(crate) api_key_file: Option<PathBuf>,
    pub(crate) device: Device,
    pub(crate) max_model_len: Option<u32>,
    pub(crate) max_num_seqs: Option<u32>,
    pub(crate) max_num_batched_tokens: Option<u32>,
    pub(crate) max_queue: u32,
    pub(crate) block_size: Option<u32>,
    pub(crate) kv_cache_memory: Option<u64>,
    pub(crate) kv_cache_dtype: KvCacheDtype,
    pub(crate) enable_prefix_caching: bool,
    pub(crate) gpu_memory_utilization: f32,
    pub(crate) overlap: Option<Overlap>,
    pub(crate) cpu_mode: CpuMode,
    pub(crate) threads: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) step_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) max_body_size: u64,
    pub(crate) max_connections: usize,
    pub(crate) log_format: LogFormat,
    pub(crate) log_level: LogLevel,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: crate::resolve::DEFAULT_MODEL.into(),
            load_format: LoadFormat::Auto,
            served_model_name: Vec::new(),
            chat_template: None,
            host: "127.0.0.1".into(),
            port: 8000,
            api_key: Vec::new(),
            api_key_file: None,
            device: Device::Auto,
            max_model_len: None,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            max_queue: 1024,
            block_size: None,
            kv_cache_memory: None,
            kv_cache_dtype: KvCacheDtype::Auto,
            enable_prefix_caching: true,
            gpu_memory_utilization: 0.9,
            overlap: None,
            cpu_mode: CpuMode::Fast,
            threads: 0,
            request_timeout: Duration::from_secs(600),
            step_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(30),
            max_body_size: 16 << 20,
            max_connections: 4096,
            log_format: LogFormat::Auto,
            log_level: LogLevel::Info,
        }
    }
}

/// A setting with a few named values.
macro_rules! choice {
    ($(#[$doc:meta])* $type:ident { $($variant:ident = $name:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum $type { $($variant),+ }

        impl $type {
            pub(crate) fn parse(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(format!("'{text}' is not one of {}", [$($name),+].join(", "))),
                }
            }

            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }
    };
}

choice! {
    /// How the numbers of the KV cache are stored.
    KvCacheDtype {
        Auto = "auto",
        F32 = "f32",
        F16 = "f16",
        Bf16 = "bf16",
        Fp8 = "fp8",
        Int8 = "int8",
    }
}
choice! {
    /// Where weights come from.
    LoadFormat { Auto = "auto", Dummy = "dummy" }
}
choice! {
    /// How the CPU backend computes.
    CpuMode { Exact = "exact", Fast = "fast" }
}
choice! {
    /// How log lines look.
    LogFormat { Auto = "auto", Pretty = "pretty", Json = "json" }
}
choice! {
    /// How much is logged.
    LogLevel { Error = "error", Warn = "warn", Info = "info", Debug = "debug", Trace = "trace" }
}

/// Where a value that is not the default came from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Origin {
    /// A key of the configuration file.
    File(PathBuf),
    /// An environment variable.
    Variable(String),
    /// A flag on the command line.
    Flag(&'static str),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Variable(name) => write!(f, "environment {name}"),
            Origin::Flag(flag) => write!(f, "--{flag}"),
        }
    }
}

/// Settings and the origin, by key, of each that is not the default.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Loaded {
    pub(crate) settings: Settings,
    pub(crate) origins: BTreeMap<String, Origin>,
}

impl Loaded {
    /// Merges the three sources: `file`, then `environment`, then `flags` (flag name, value).
    pub(crate) fn from_sources(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        flags: &[(&'static str, String)],
    ) -> Result<Self> {
        let mut loaded = Self::default();
        if let Some(path) = file {
            loaded.read_file(path)?;
        }
        loaded.read_environment(environment)?;
        for (flag, value) in flags {
            let setting = SETTINGS.iter().find(|s| s.flag == *flag);
            let setting = setting.expect("the command line's flags are made from this table");
            loaded.set(setting, value, Origin::Flag(setting.flag))?;
        }
        loaded.settings.check()?;
        Ok(loaded)
    }

    fn set(&mut self, setting: &Setting, value: &str, origin: Origin) -> Result<()> {
        (setting.set)(&mut self.settings, value)
            .map_err(|reason| anyhow!("{} ({origin}): {reason}", setting.key()))?;
        self.origins.insert(setting.key(), origin);
        Ok(())
    }

    fn read_file(&mut self, path: &Path) -> Result<()> {
        let shown = path.display();
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("can't read the configuration file {shown}"))?;
        let table: toml::Table = text
            .parse()
            .with_context(|| format!("the configuration file {shown} is not valid TOML"))?;
        for (key, value) in &table {
            let setting = Setting::by_key(key)
                .ok_or_else(|| anyhow!("{shown}: unknown setting '{key}'{}", hint(key)))?;
            let value = plain_value(setting, value)
                .ok_or_else(|| anyhow!("{shown}: '{key}' has a value of the wrong type"))?;
            self.set(setting, &value, Origin::File(path.to_owned()))?;
        }
        Ok(())
    }

    fn read_environment(
        &mut self,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<()> {
        for (name, value) in variables {
            let Some(rest) = name.strip_prefix(ENV_PREFIX) else {
                continue;
            };
            let key = rest.to_ascii_lowercase();
            match Setting::by_key(&key) {
                // For a service called "spate" Kubernetes sets SPATE_PORT=tcp://…: not ours.
                Some(_) if value.starts_with("tcp://") => {}
                Some(setting) => self.set(setting, &value, Origin::Variable(name))?,
                // Others may use our prefix; only what looks like a typing mistake is one.
                None => {
                    if nearest(&key, keys().iter().map(String::as_str)).is_some() {
                        bail!("unknown setting in the environment: {name}{}", hint(&key));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Settings {
    /// Checks what only shows when all values are known.
    fn check(&self) -> Result<()> {
        if let (Some(tokens), Some(seqs)) = (self.max_num_batched_tokens, self.max_num_seqs)
            && tokens < seqs
        {
            bail!(
                "max_num_batched_tokens ({tokens}) is less than max_num_seqs ({seqs}): a step computes a \
                 token for each running sequence; raise the first or lower the second"
            );
        }
        if self.step_timeout < Duration::from_secs(1) {
            bail!("step_timeout must be at least 1s: an ordinary step could take longer");
        }
        Ok(())
    }

    /// The keys that open the API, from the setting and from the file.
    pub(crate) fn api_keys(&self) -> Result<Vec<String>> {
        let mut keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("can't read api_key_file {}", path.display()))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            keys.extend(lines.map(str::to_owned));
            if keys.is_empty() {
                // An empty list means "no key needed": never what a file of keys is for.
                bail!("api_key_file {} holds no key", path.display());
            }
        }
        Ok(keys)
    }

    /// All settings as a configuration file, each with its origin. Keys are not shown.
    pub(crate) fn to_toml(&self, origins: &BTreeMap<String, Origin>) -> String {
        let mut text = String::new();
        for setting in SETTINGS {
            let key = setting.key();
            let shown = (setting.show)(self);
            let origin = origins
                .get(&key)
                .map_or("default".into(), Origin::to_string);
            let line = match shown.parse::<i64>() {
                _ if key == "api_key" || shown.is_empty() => format!("# {key} = {shown}"),
                Ok(number) => format!("{key} = {number}"),
                Err(_) if shown == "true" || shown == "false" => format!("{key} = {shown}"),
                Err(_) => format!("{key} = {}", toml::Value::String(shown)),
            };
            text.push_str(&format!("{:<48} # {origin}\n", line.trim_end()));
        }
        text
    }
}

fn keys() -> Vec<String> {
    SETTINGS.iter().map(Setting::key).collect()
}

fn hint(key: &str) -> String {
    let keys = keys();
    match nearest(key, keys.iter().map(String::as_str)) {
        Some(name) => format!(", did you mean '{name}'?"),
        None => "; `spate serve --print-config` lists all settings".into(),
    }
}

/// A TOML value as it would be written on the command line.
fn plain_value(setting: &Setting, value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(switch) => Some(switch.to_string()),
        toml::Value::Array(items) if setting.is_list => {
            let texts: Option<Vec<&str>> = items.iter().map(toml::Value::as_str).collect();
            texts.map(|texts| texts.join(","))
        }
        // `{ decode_sms = 24 }`
        toml::Value::Table(table) if table.len() == 1 => {
            let (key, value) = table.iter().next()?;
            Some(format!("{key}={}", value.as_integer()?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
