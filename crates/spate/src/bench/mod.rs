//! `spate bench`: load for any OpenAI server, closed loop (`--concurrency`) or open loop (`--rate`).

mod report;
mod workload;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::client::{Client, Refusal};
use report::{Report, Sample};
use workload::{Length, Random, Workload};

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
    /// Closed loop: this many requests are always running
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    concurrency: u32,
    /// Open loop: requests a second, arriving at random (Poisson), however many are running
    #[arg(long, conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Prompt tokens: 512, or 256..768 for a uniform spread
    #[arg(long, default_value = "512")]
    prompt_len: Length,
    /// Output tokens, likewise
    #[arg(long, default_value = "128")]
    output_len: Length,
    /// Share of the mean prompt that all prompts have in common, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    shared_prefix: f64,
    /// Requests before the measured ones
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    warmup: u64,
    /// Seed of prompts and arrivals: the same seed sends the same requests
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Send words where a server takes no token ids; prompt lengths are then approximate
    #[arg(long)]
    text_prompts: bool,
    /// Also write the result as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Warm-up requests have numbers from here on, so that they share no prompt with measured ones.
const WARMUP_INDEX: u64 = 1 << 40;

/// Runs the load and prints the table.
pub(crate) async fn run(args: BenchArgs) -> Result<()> {
    if !(0.0..=1.0).contains(&args.shared_prefix) {
        bail!("--shared-prefix is a share from 0 to 1, not {}", args.shared_prefix);
    }
    if args.rate.is_some_and(|rate| !(1e-3..=1e6).contains(&rate)) {
        bail!("--rate is a number of requests a second from 0.001 to 1000000");
    }
    let client = Arc::new(Client::new(&args.url, args.api_key.as_deref())?);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => client.first_model().await?,
    };
    let workload = Arc::new(Workload {
        model,
        prompt_len: args.prompt_len,
        output_len: args.output_len,
        shared_prefix: args.shared_prefix,
        text_prompts: args.text_prompts,
        seed: args.seed,
    });

    closed_loop(&client, &workload, WARMUP_INDEX..WARMUP_INDEX + args.warmup, args.concurrency).await;
    let load = match args.rate {
        Some(rate) => format!("{rate} requests/s"),
        None => format!("{} at once", args.concurrency),
    };
    eprintln!(
        "{} × {}: prompts {} ({:.0} % shared), outputs {}, {load}",
        args.requests,
        workload.model,
        args.prompt_len,
        args.shared_prefix * 100.0,
        args.output_len
    );
    let start = Instant::now();
    let outcomes = match args.rate {
        Some(rate) => open_loop(&client, &workload, args.requests, rate, args.seed).await,
        None => closed_loop(&client, &workload, 0..args.requests, args.concurrency).await,
    };
    let report = summarise(outcomes, start.elapsed());
    print!("{}", report.table());
    if let Some(path) = &args.json {
        write_json(path, &args, &workload, &report)?;
    }
    if report.completed == 0 {
        bail!("no request completed");
    }
    Ok(())
}

fn write_json(path: &PathBuf, args: &BenchArgs, workload: &Workload, report: &Report) -> Result<()> {
    let document = json!({
        "url": args.url,
        "model": workload.model,
        "requests": args.requests,
        "concurrency": args.rate.is_none().then_some(args.concurrency),
        "rate": args.rate,
        "prompt_len": args.prompt_len.to_string(),
        "output_len": args.output_len.to_string(),
        "shared_prefix": args.shared_prefix,
        "seed": args.seed,
        "result": report,
    });
    let text = serde_json::to_string_pretty(&document)?;
    std::fs::write(path, text + "\n").with_context(|| format!("can't write {}", path.display()))
}

type Outcome = Result<Sample>;

async fn closed_loop(
    client: &Arc<Client>,
    workload: &Arc<Workload>,
    indices: std::ops::Range<u64>,
    concurrency: u32,
) -> Vec<Outcome> {
    let next = Arc::new(AtomicU64::new(indices.start));
    let mut workers = JoinSet::new();
    for _ in 0..u64::from(concurrency).min(indices.end - indices.start) {
        let (client, workload, next) = (client.clone(), workload.clone(), next.clone());
        workers.spawn(async move {
            let mut outcomes = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= indices.end {
                    return outcomes;
                }
                outcomes.push(measure(&client, &workload, index).await);
            }
        });
    }
    workers.join_all().await.into_iter().flatten().collect()
}

async fn open_loop(
    client: &Arc<Client>,
    workload: &Arc<Workload>,
    requests: u64,
    rate: f64,
    seed: u64,
) -> Vec<Outcome> {
    let mut random = Random::new(!seed);
    let mut due = tokio::time::Instant::now();
    let mut running = JoinSet::new();
    for index in 0..requests {
        // Against the schedule, not the last request: a late start does not shift the rest.
        tokio::time::sleep_until(due).await;
        let (client, workload) = (client.clone(), workload.clone());
        running.spawn(async move { measure(&client, &workload, index).await });
        due += random.gap(rate);
    }
    running.join_all().await
}

/// Sends one request and follows its stream.
async fn measure(client: &Client, workload: &Workload, index: u64) -> Outcome {
    let body = workload.body(index);
    let start = Instant::now();
    let mut stream = client.stream("/v1/completions", body).await?;
    let mut sample = Sample::default();
    let mut last = None;
    let mut chunks = 0;
    while let Some(event) = stream.next().await? {
        let now = start.elapsed();
        if brings_tokens(&event, &sample) {
            match last {
                None => sample.ttft = now,
                Some(last) => sample.gaps.push(now - last),
            }
            last = Some(now);
            sample.total = now;
            chunks += 1;
        }
        read_usage(&event["usage"], &mut sample);
    }
    if chunks == 0 {
        bail!("the stream brought no token");
    }
    if sample.output_tokens == 0 {
        // A server without usage: one token a chunk is the usual case.
        sample.output_tokens = chunks;
    }
    Ok(sample)
}

/// Whether this chunk has output: its running usage grew, or else it has text.
fn brings_tokens(event: &Value, so_far: &Sample) -> bool {
    if event["choices"].as_array().is_none_or(Vec::is_empty) {
        return false;
    }
    match event["usage"]["completion_tokens"].as_u64() {
        Some(tokens) => tokens > so_far.output_tokens,
        None => event["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()),
    }
}

fn read_usage(usage: &Value, sample: &mut Sample) {
    let read = |value: &Value, field: &mut u64| *field = value.as_u64().unwrap_or(*field);
    read(&usage["prompt_tokens"], &mut sample.prompt_tokens);
    read(&usage["completion_tokens"], &mut sample.output_tokens);
    read(&usage["prompt_tokens_details"]["cached_tokens"], &mut sample.cached_tokens);
}

fn summarise(outcomes: Vec<Outcome>, duration: Duration) -> Report {
    let mut samples = Vec::new();
    let mut errors = BTreeMap::new();
    for outcome in outcomes {
        match outcome {
            Ok(sample) => samples.push(sample),
            Err(e) => {
                // Messages of refusals may name numbers of the one request; the status does not.
                let kind = match e.downcast_ref::<Refusal>() {
                    Some(refusal) => format!("HTTP {}", refusal.status.as_u16()),
                    None => e.to_string(),
                };
                *errors.entry(kind).or_insert(0) += 1;
            }
        }
    }
    Report::new(&samples, errors, duration)
}
