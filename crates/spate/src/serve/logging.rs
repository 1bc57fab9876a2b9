//! Log lines go to standard error: pretty on a terminal, JSON otherwise.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;

use crate::settings::{LogFormat, LogLevel};

/// Sets up logging for the process. A second call changes nothing.
pub(crate) fn init(format: LogFormat, level: LogLevel) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let is_terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(is_terminal);
    let is_json = match format {
        LogFormat::Json => true,
        LogFormat::Pretty => false,
        LogFormat::Auto => !is_terminal,
    };
    // Fails only when a subscriber is there already.
    let _second = match is_json {
        true => builder
            .json()
            .flatten_event(true)
            .with_ansi(false)
            .try_init(),
        false => builder.with_target(false).try_init(),
    };
}
