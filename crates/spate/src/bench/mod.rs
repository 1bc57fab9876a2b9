//! `spate bench`: load for any OpenAI server, closed loop (`--concurrency`) or open loop (`--rate`).
//! `benches/README.md` says what the figures mean.

mod drive;
mod measure;
mod report;
mod workload;

use std::io::{IsTerminal, Write};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::client::Client;
use drive::{Load, drive};
use report::Report;
use workload::{Length, SharedPrefix, Workload};

/// Measure an OpenAI server
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// The server
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// The model to name in requests [default: the first that the server lists]
    #[arg(long)]
    model: Option<String>,
    /// The server's API key
    #[arg(long, env = "SPATE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests to send
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    requests: u64,
    /// Requests before those, which don't count
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    warmup: u64,
    /// Closed loop: this many requests are always running
    #[arg(long, default_value = "8")]
    concurrency: NonZeroU32,
    /// Open loop: requests a second, arriving at random (Poisson), however many are running
    #[arg(long, conflicts_with = "concurrency", value_parser = rate)]
    rate: Option<f64>,
    /// Prompt tokens: 512, or 256..768 for a uniform spread
    #[arg(long, default_value = "512")]
    prompt_len: Length,
    /// Output tokens, likewise
    #[arg(long, default_value = "128")]
    output_len: Length,
    /// How much of the beginning prompts share: tokens (2048), or a part of each prompt (50%)
    #[arg(long, value_name = "TOKENS|PERCENT", default_value = "0")]
    shared_prefix: SharedPrefix,
    /// Share of the requests that begin with the shared prefix, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = share)]
    shared_share: f64,
    /// Seed of prompts, lengths and arrivals: the same seed sends the same requests
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Vocabulary size: prompt token ids stay below it
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(16..=1 << 24))]
    vocab: u32,
    /// Send words where a server takes no token ids; prompt lengths are then approximate
    #[arg(long)]
    text_prompts: bool,
    /// Also write settings and results as JSON; - is standard output, the table then goes to standard error
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-3..=1e6).contains(rate));
    rate.ok_or_else(|| "requests a second, from 0.001 to 1000000".into())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a share is a number from 0 to 1".into())
}

/// What is written as JSON.
#[derive(Serialize)]
struct Document<'a> {
    url: &'a str,
    #[serde(flatten)]
    load: Load,
    requests: u64,
    warmup: u64,
    #[serde(flatten)]
    workload: &'a Workload,
    result: &'a Report,
}

/// Runs the load and prints the table. Ctrl-C ends it early and prints what there is.
///
/// # Errors
/// A setting that can't be, a server that does not say what it serves, or no request completed.
pub(crate) async fn run(args: BenchArgs) -> Result<()> {
    args.shared_prefix.check(args.prompt_len)?;
    let client = Arc::new(Client::new(&args.url, args.api_key.as_deref())?);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => client
            .first_model()
            .await
            .context("can't ask which model is served (or use --model)")?,
    };
    let workload = Arc::new(Workload {
        model,
        prompt_len: args.prompt_len,
        output_len: args.output_len,
        shared_prefix: args.shared_prefix,
        shared_share: args.shared_share,
        vocab: args.vocab,
        text_prompts: args.text_prompts,
        seed: args.seed,
    });
    let closed = Load::Closed {
        concurrency: args.concurrency,
    };
    let load = args.rate.map_or(closed, |rate| Load::Open { rate });

    if args.warmup > 0 {
        // Numbered from here on, they have no prompt in common with the measured ones; what is
        // shared is shared: a prefix cache is warm afterwards.
        const FIRST: u64 = 1 << 40;
        let (outcomes, interrupted) = drive(
            &client,
            &workload,
            closed,
            FIRST..FIRST + args.warmup,
            ctrl_c(),
            |_| {},
        )
        .await;
        if interrupted {
            bail!("interrupted in the warm-up: nothing was measured");
        }
        if let Some(Err(e)) = outcomes.into_iter().find(Result::is_err) {
            bail!("a warm-up request failed: {e}");
        }
    }

    eprintln!(
        "{} requests to {}, {load}; {workload}",
        args.requests, args.url
    );
    let progress = ProgressBar::new(args.requests);
    let start = Instant::now();
    let (outcomes, _) = drive(
        &client,
        &workload,
        load,
        0..args.requests,
        ctrl_c(),
        |done| {
            progress.set_position(done);
        },
    )
    .await;
    let duration = start.elapsed();
    progress.finish_and_clear();

    let report = Report::new(args.requests, outcomes, duration);
    show(&args, load, &workload, &report)?;
    if report.completed == 0 {
        bail!("no request completed");
    }
    Ok(())
}

fn show(args: &BenchArgs, load: Load, workload: &Workload, report: &Report) -> Result<()> {
    let to_stdout = args
        .json
        .as_ref()
        .is_some_and(|path| path.as_os_str() == "-");
    match to_stdout {
        true => write!(std::io::stderr(), "{report}")?,
        false => write!(std::io::stdout(), "{report}")?,
    }
    let Some(path) = &args.json else {
        return Ok(());
    };
    let document = Document {
        url: &args.url,
        load,
        requests: args.requests,
        warmup: args.warmup,
        workload,
        result: report,
    };
    let text = serde_json::to_string_pretty(&document)? + "\n";
    match to_stdout {
        true => std::io::stdout().write_all(text.as_bytes())?,
        false => {
            std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))?
        }
    }
    Ok(())
}

/// Resolves at Ctrl-C.
async fn ctrl_c() {
    if let Err(e) = tokio::signal::ctrl_c().await {
        eprintln!("Ctrl-C can't be caught ({e}); it will end the program at once");
        std::future::pending::<()>().await;
    }
    if std::io::stderr().is_terminal() {
        // After the terminal's own ^C.
        eprintln!();
    }
}
