//! The Spate daemon and command line.

mod backend;
mod bench;
mod chat;
mod client;
mod doctor;
mod inspect;
mod memory;
mod models;
mod opened;
mod resolve;
mod serve;
mod settings;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

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
    Chat(chat::ChatArgs),
    Bench(bench::BenchArgs),
    Inspect(inspect::InspectArgs),
    Doctor(doctor::DoctorArgs),
    Pull(models::PullArgs),
    Models(models::ModelsArgs),
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("spate: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    // Two threads are enough for the sockets; the cores belong to the model.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("spate-io")
        .enable_all()
        .build()
        .context("can't start the I/O threads")?;
    let outcome = match cli.command {
        Command::Serve(args) => runtime.block_on(serve::run(args)),
        Command::Chat(args) => runtime.block_on(chat::run(args)),
        Command::Bench(args) => runtime.block_on(bench::run(args)),
        Command::Inspect(args) => inspect::run(&args),
        Command::Pull(args) => models::pull(&args),
        Command::Models(args) => models::models(&args),
        Command::Doctor(args) => return doctor::run(&args),
    };
    // Loading may still be under way on a thread that can't be called off.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}
