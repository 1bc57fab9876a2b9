//! `spate chat`: a conversation in the terminal, over the same HTTP API that everyone uses.

use std::io::{BufRead, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::client::Client;
use crate::serve;
use crate::settings::SettingFlags;

/// Talk to a model in the terminal
#[derive(Debug, clap::Args)]
pub(crate) struct ChatArgs {
    /// A running server to talk to; without it the model runs in this process
    #[arg(long)]
    url: Option<String>,
    /// Instructions that come before the conversation
    #[arg(long)]
    system: Option<String>,
    /// Randomness from 0 (none) to 2
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 1024)]
    max_tokens: u32,
    #[command(flatten)]
    settings: SettingFlags,
}

const HELP: &str = "/system TEXT  new instructions (empty: none)\n\
                    /reset        forget the conversation\n\
                    /exit         leave (or Ctrl-D); Ctrl-C stops an answer";

/// Runs until the end of input or `/exit`.
pub(crate) async fn run(args: ChatArgs) -> Result<()> {
    let loaded = args.settings.load()?;
    let api_key = loaded.settings.api_keys()?.into_iter().next();
    match &args.url {
        Some(url) => {
            let client = Client::new(url, api_key.as_deref())?;
            // A server may have several names for its model: only one that was typed is asked for.
            let model = match loaded.origins.contains_key("model") {
                true => loaded.settings.model.clone(),
                false => client.first_model().await?,
            };
            Conversation::new(client, model, &args).run().await
        }
        None => {
            let local = serve::start_local(loaded.settings).await?;
            let client = Client::new(&local.url, api_key.as_deref())?;
            let model = client.first_model().await?;
            let outcome = Conversation::new(client, model, &args).run().await;
            local.stop().await?;
            outcome
        }
    }
}

struct Conversation {
    client: Client,
    model: String,
    system: Option<String>,
    temperature: f64,
    max_tokens: u32,
    /// User and assistant in turn, without the system message.
    messages: Vec<Value>,
}

impl Conversation {
    fn new(client: Client, model: String, args: &ChatArgs) -> Self {
        Self {
            client,
            model,
            system: args.system.clone(),
            temperature: args.temperature,
            max_tokens: args.max_tokens,
            messages: Vec::new(),
        }
    }

    async fn run(mut self) -> Result<()> {
        let is_terminal = std::io::stdin().is_terminal();
        if is_terminal {
            eprintln!("{}: type a message, /help for help", self.model);
        }
        let mut lines = stdin_lines()?;
        loop {
            if is_terminal {
                show("> ");
            }
            let line = tokio::select! {
                line = lines.recv() => line,
                interrupted = tokio::signal::ctrl_c() => {
                    interrupted?;
                    eprintln!("\n/exit or Ctrl-D leaves");
                    continue;
                }
            };
            let Some(line) = line else { return Ok(()) };
            let (command, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match command {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/help" => eprintln!("{HELP}"),
                "/reset" => self.messages.clear(),
                "/system" => self.system = Some(rest.trim().to_owned()).filter(|text| !text.is_empty()),
                command if command.starts_with('/') => eprintln!("unknown command {command}\n{HELP}"),
                _ => self.ask(line).await?,
            }
        }
    }

    /// One turn. A request that fails is reported, and the conversation goes on without it.
    async fn ask(&mut self, question: String) -> Result<()> {
        self.messages.push(json!({"role": "user", "content": question}));
        let mut answer = Answer::default();
        let outcome = tokio::select! {
            outcome = self.follow(&mut answer) => outcome,
            // Dropping the stream closes its connection, which ends the request on the server.
            interrupted = tokio::signal::ctrl_c() => interrupted.context("can't wait for Ctrl-C"),
        };
        println!();
        if let Err(e) = outcome {
            eprintln!("{e:#}");
            if answer.text.is_empty() {
                self.messages.pop();
                return Ok(());
            }
        }
        if let Some(rate) = answer.tokens_per_second() {
            eprintln!("[{} tokens, {rate:.1} tok/s]", answer.tokens);
        }
        self.messages.push(json!({"role": "assistant", "content": answer.text}));
        Ok(())
    }

    async fn follow(&self, answer: &mut Answer) -> Result<()> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        let body = json!({
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let mut stream = self.client.stream("/v1/chat/completions", Bytes::from(body.to_string())).await?;
        while let Some(event) = stream.next().await? {
            if let Some(text) = event["choices"][0]["delta"]["content"].as_str() {
                answer.add(text);
                show(text);
            }
            if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
                answer.tokens = tokens;
            }
        }
        Ok(())
    }
}

/// What has come of an answer.
#[derive(Default)]
struct Answer {
    text: String,
    /// Counted by chunks until the usage is known.
    tokens: u64,
    first: Option<Instant>,
    span: Duration,
}

impl Answer {
    fn add(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let first = *self.first.get_or_insert_with(Instant::now);
        self.span = first.elapsed();
        self.text.push_str(text);
        self.tokens += 1;
    }

    /// Of the tokens after the first.
    fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.span.as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

fn show(text: &str) {
    print!("{text}");
    // A closed terminal: the next read of it ends the conversation.
    let _closed = std::io::stdout().flush();
}

/// Lines of standard input, read on a thread of its own: a blocked read can't be called off.
fn stdin_lines() -> Result<mpsc::Receiver<String>> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    })?;
    Ok(lines)
}
