//! The Spate daemon and command line.

mod bench;
mod chat;
mod client;
mod models;
mod resolve;
mod serve;
mod settings;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use settings::SettingFlags;

/// An OpenAI-compatible LLM server in one binary
#[derive(Debug, Parser)]
#[command(name = "spate", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    /// Talk to a model in the terminal
    Chat {
        #[command(flatten)]
        chat: chat::ChatArgs,
        #[command(flatten)]
        settings: SettingFlags,
    },
    Bench(bench::BenchArgs),
    Pull(models::PullArgs),
    Models(models::ModelsArgs),
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("spate: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    // Two threads are enough for the sockets; the cores belong to the model.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("spate-io")
        .enable_all()
        .build()
        .context("can't start the I/O threads")?;
    let outcome = match cli.command {
        Command::Serve(args) => runtime.block_on(serve::run(args)),
        Command::Chat { chat, settings } => runtime.block_on(talk(chat, &settings)),
        Command::Bench(args) => runtime.block_on(bench::run(args)),
        Command::Pull(args) => models::pull(&args),
        Command::Models(args) => models::models(&args),
    };
    // Loading may still be under way on a thread that can't be called off.
    runtime.shutdown_background();
    outcome
}

/// A conversation with the server at `--url`, or with one in this process.
async fn talk(args: chat::ChatArgs, flags: &SettingFlags) -> Result<()> {
    let loaded = flags.load()?;
    let keys = loaded.settings.api_keys()?;
    let key = keys.first().map(String::as_str);
    if let Some(url) = args.url.clone() {
        // The default model is this program's: another server may not have it.
        let is_named = loaded.origins.contains_key("model");
        let model = is_named.then_some(loaded.settings.model);
        return chat::run(args, &url, model, key).await;
    }
    let local = serve::start_local(loaded.settings).await?;
    let outcome = chat::run(args, &local.url, None, key).await;
    local.stop().await?;
    outcome
}
