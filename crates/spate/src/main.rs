//! The Spate daemon and command line.

mod bench;
mod chat;
mod client;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// An OpenAI-compatible LLM server
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure an OpenAI server
    Bench(bench::BenchArgs),
    /// Talk to a model in the terminal
    Chat {
        /// The model
        model: Option<String>,
        /// The server's API key
        #[arg(long, env = "SPATE_API_KEY", hide_env_values = true)]
        api_key: Option<String>,
        #[command(flatten)]
        chat: chat::ChatArgs,
    },
}

#[tokio::main]
async fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Bench(args) => bench::run(args).await,
        Command::Chat {
            model,
            api_key,
            chat,
        } => {
            let url = chat.url.clone().context("chat needs --url")?;
            chat::run(chat, &url, model, api_key.as_deref()).await
        }
    }
}
