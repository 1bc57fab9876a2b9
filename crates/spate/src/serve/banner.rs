//! What a person sees once the model is ready.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use spate_executor::LocalKv;

use super::load::Summary;
use crate::settings::units::format_size;
use crate::settings::{LogFormat, Origin, SETTINGS, Settings};

/// Everything the banner tells.
pub(crate) struct Banner<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) origins: &'a BTreeMap<String, Origin>,
    pub(crate) summary: &'a Summary,
    pub(crate) address: SocketAddr,
    pub(crate) startup: Duration,
}

/// The settings are wrapped at this column.
const WIDTH: usize = 100;

impl Banner<'_> {
    /// On standard output; whoever asked for JSON logs gets a log event alone.
    pub(crate) fn show(&self) {
        if self.settings.log_format != LogFormat::Json {
            // Nobody reads standard output: no reason not to serve.
            let _unread = std::io::stdout().write_all(self.text().as_bytes());
        }
        tracing::info!(
            address = %self.address,
            model = self.summary.model,
            backend = self.summary.backend,
            max_model_len = self.summary.max_model_len,
            startup_seconds = self.startup.as_secs_f32(),
            "ready"
        );
    }

    fn text(&self) -> String {
        let summary = self.summary;
        let capacity = &summary.capacity;
        let mut text = format!("\nSpate {}\n\n", env!("CARGO_PKG_VERSION"));
        let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<10}{value}\n"));
        line(
            "model",
            format!("{} ({})", summary.model, summary.architecture),
        );
        line("file", summary.path.display().to_string());
        line("backend", summary.backend.clone());
        for (i, (part, bytes)) in summary.memory.iter().enumerate() {
            let name = if i == 0 { "memory" } else { "" };
            line(name, format!("{part:<14}{:>10}", format_size(*bytes)));
        }
        let total = summary.memory.iter().map(|(_, bytes)| bytes).sum();
        let of = summary.device_memory.map(format_size);
        let of = of.map_or(String::new(), |all| format!(" of {all}"));
        line("", format!("{:<14}{:>10}{of}", "total", format_size(total)));
        line(
            "capacity",
            format!(
                "{} tokens in {} KV blocks of {}; {} tokens a request, {} a step; {} sequences running, {} waiting",
                u64::from(capacity.blocks) * u64::from(capacity.block_size),
                capacity.blocks,
                capacity.block_size,
                summary.max_model_len,
                capacity.max_batch_tokens,
                summary.sizes.max_num_seqs,
                self.settings.max_queue
            ),
        );
        if let Some(LocalKv { window, blocks }) = capacity.local {
            line(
                "",
                format!("{blocks} more KV blocks for layers that see the last {window} tokens"),
            );
        }
        for (i, words) in self.settings_lines().into_iter().enumerate() {
            line(if i == 0 { "settings" } else { "" }, words);
        }
        line(
            "address",
            format!(
                "http://{} (ready in {:.2} s)",
                self.address,
                self.startup.as_secs_f32()
            ),
        );
        text.push_str(&format!("\n{}\n\n", self.curl()));
        text
    }

    /// `name=value`, and where it came from when it is not the default.
    fn settings_lines(&self) -> Vec<String> {
        let mut lines = vec![String::new()];
        for setting in SETTINGS {
            let (key, value) = (setting.key(), (setting.show)(self.settings));
            if value.is_empty() {
                continue;
            }
            let origin = self.origins.get(&key).map(|origin| format!(" ({origin})"));
            let words = format!("{key}={value}{}", origin.unwrap_or_default());
            match lines.last_mut() {
                Some(line) if line.is_empty() => *line = words,
                Some(line) if line.len() + words.len() + 2 <= WIDTH => {
                    *line += &format!("  {words}")
                }
                _ => lines.push(words),
            }
        }
        lines
    }

    /// A request that works when pasted.
    fn curl(&self) -> String {
        let ip = match self.address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let address = SocketAddr::new(ip, self.address.port());
        let has_key = !self.settings.api_key.is_empty() || self.settings.api_key_file.is_some();
        let key = match has_key {
            true => " -H \"Authorization: Bearer $SPATE_API_KEY\"",
            false => "",
        };
        let model = &self.summary.model;
        let (path, body) = match self.summary.has_template {
            true => (
                "chat/completions",
                serde_json::json!({"model": model, "messages": [{"role": "user", "content": "Hello!"}]}),
            ),
            false => (
                "completions",
                serde_json::json!({"model": model, "prompt": "Once upon a time", "max_tokens": 64}),
            ),
        };
        // A shell's single quotes keep everything but themselves.
        let body = body.to_string().replace('\'', "'\\''");
        format!(
            "curl http://{address}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'"
        )
    }
}
