//! `spate chat`: a conversation in the terminal, over the same HTTP API that everyone uses.

mod input;

use std::io::{BufRead, IsTerminal, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tokio::signal::ctrl_c;
use tokio::sync::mpsc;

use crate::client::{Client, ClientError};
use crate::serve;
use crate::settings::SettingFlags;
use input::{Assembler, Input};

/// Talk to a model in the terminal
#[derive(Debug, clap::Args)]
pub(crate) struct ChatArgs {
    /// A running server to talk to; without it the model runs in this process
    #[arg(long)]
    url: Option<String>,
    /// Instructions that come before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Randomness, from 0 (none) to 2 [default: the server's]
    #[arg(long)]
    temperature: Option<f32>,
    #[command(flatten)]
    settings: SettingFlags,
}

const HELP: &str = "\
/system TEXT  new instructions (without TEXT: none)
/reset        forget the conversation
/exit         leave (so do Ctrl-D and Ctrl-C)
\\ at the end of a line continues the message on the next; \"\"\" begins and ends a block of lines.
Ctrl-C during an answer stops the answer.
";

/// Runs until the end of input, `/exit`, or Ctrl-C at the prompt.
///
/// # Errors
/// The model can't be loaded or the server not be reached; or a request failed and nobody is there
/// to try another.
pub(crate) async fn run(args: ChatArgs) -> Result<()> {
    let loaded = args.settings.load()?;
    let api_key = loaded.settings.api_keys()?.into_iter().next();
    if let Some(url) = &args.url {
        // A server may have several names for its model: only one that was typed is asked for.
        let is_named = loaded.origins.contains_key("model");
        let model = is_named.then(|| loaded.settings.model.clone());
        return converse(&args, url, model, api_key.as_deref()).await;
    }
    let local = serve::start_local(loaded.settings).await?;
    let outcome = converse(&args, &local.url, None, api_key.as_deref()).await;
    outcome.and(local.stop().await)
}

/// With the server at `url`. `model` is the name to ask for; by default the first that it lists.
async fn converse(
    args: &ChatArgs,
    url: &str,
    model: Option<String>,
    api_key: Option<&str>,
) -> Result<()> {
    let client = Client::new(url, api_key)?;
    let model = match model {
        Some(model) => model,
        None => client
            .first_model()
            .await
            .context("can't ask which model is served")?,
    };
    let mut chat = Chat {
        conversation: Conversation {
            model,
            system: args.system.clone(),
            messages: Vec::new(),
        },
        client,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        is_interactive: std::io::stdin().is_terminal(),
    };
    chat.run(stdin_lines()?).await
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    User,
    Assistant,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Message<'a> {
    role: Role,
    content: &'a str,
}

#[derive(Serialize)]
struct ChatRequest<'a> {
    model: &'a str,
    messages: Vec<Message<'a>>,
    max_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    stream: bool,
    stream_options: StreamOptions,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// What the server is told each time.
struct Conversation {
    model: String,
    system: Option<String>,
    /// User and assistant in turn, without the system message.
    messages: Vec<(Role, String)>,
}

impl Conversation {
    fn messages(&self) -> Vec<Message<'_>> {
        let system = self.system.iter().map(|text| (Role::System, text));
        let turns = self.messages.iter().map(|(role, text)| (*role, text));
        system
            .chain(turns)
            .map(|(role, content)| Message { role, content })
            .collect()
    }
}

struct Chat {
    client: Client,
    conversation: Conversation,
    max_tokens: u32,
    temperature: Option<f32>,
    /// A person types: prompts and figures are shown, and errors end only their turn.
    is_interactive: bool,
}

impl Chat {
    async fn run(&mut self, mut lines: mpsc::Receiver<String>) -> Result<()> {
        if self.is_interactive {
            eprintln!("{}. Type a message, or /help.", self.conversation.model);
        }
        let mut assembler = Assembler::default();
        loop {
            self.prompt(&assembler);
            let line = tokio::select! {
                line = lines.recv() => line,
                interrupted = ctrl_c() => {
                    interrupted.context("can't wait for Ctrl-C")?;
                    eprintln!();
                    return Ok(());
                }
            };
            let is_end = line.is_none();
            let input = match line {
                Some(line) => assembler.push(&line),
                None => assembler.finish(),
            };
            match input {
                Some(Input::Exit) => return Ok(()),
                Some(input) => self.act(input).await?,
                None => {}
            }
            if is_end {
                if self.is_interactive {
                    eprintln!();
                }
                return Ok(());
            }
        }
    }

    fn prompt(&self, assembler: &Assembler) {
        if self.is_interactive {
            eprint!("{}", if assembler.is_open() { "... " } else { "> " });
        }
    }

    async fn act(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Message(text) => return self.ask(text).await,
            Input::Reset => self.conversation.messages.clear(),
            Input::System(text) => self.conversation.system = text,
            Input::Help => eprint!("{HELP}"),
            Input::Unknown(name) if self.is_interactive => eprint!("no command {name}\n{HELP}"),
            Input::Unknown(name) => bail!("no command {name}"),
            Input::Exit => {}
        }
        Ok(())
    }

    /// One turn. In a terminal a request that fails is reported, and the conversation goes on
    /// without it.
    async fn ask(&mut self, question: String) -> Result<()> {
        self.conversation.messages.push((Role::User, question));
        let mut answer = Answer::new();
        let outcome = tokio::select! {
            outcome = self.follow(&mut answer) => outcome,
            // Dropping the stream closes its connection, which ends the request on the server.
            interrupted = ctrl_c() => interrupted.context("can't wait for Ctrl-C"),
        };
        if self.is_interactive || !answer.text.is_empty() {
            show("\n")?;
        }
        if let Err(e) = outcome {
            if !self.is_interactive {
                return Err(e);
            }
            eprintln!("{e:#}");
        }
        if answer.text.is_empty() {
            self.conversation.messages.pop();
            return Ok(());
        }
        if self.is_interactive
            && let Some(figures) = answer.figures()
        {
            eprintln!("{}", dim(&figures));
        }
        self.conversation
            .messages
            .push((Role::Assistant, answer.text));
        Ok(())
    }

    async fn follow(&self, answer: &mut Answer) -> Result<()> {
        let request = ChatRequest {
            model: &self.conversation.model,
            messages: self.conversation.messages(),
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            stream: true,
            stream_options: StreamOptions {
                include_usage: true,
            },
        };
        let body = serde_json::to_vec(&request)?.into();
        let mut stream = self.client.stream("/v1/chat/completions", body).await?;
        let is_terminal = std::io::stdout().is_terminal();
        while let Some(event) = stream.next().await? {
            if let Some(usage) = event.chunk.usage {
                answer.tokens = Some(usage.completion_tokens);
            }
            let text = event
                .chunk
                .choices
                .first()
                .map_or("", |choice| choice.text());
            if !text.is_empty() {
                answer.add(text, event.at);
                match is_terminal {
                    true => show(&printable(text))?,
                    false => show(text)?,
                }
            }
        }
        if answer.text.is_empty() {
            bail!(ClientError::Malformed("the answer has no text".into()));
        }
        Ok(())
    }
}

/// What has come of an answer.
struct Answer {
    text: String,
    chunks: u64,
    /// From the usage, which an answer that was stopped does not have.
    tokens: Option<u64>,
    asked: Instant,
    /// When the first and the last text came.
    span: Option<(Instant, Instant)>,
}

impl Answer {
    fn new() -> Self {
        Self {
            text: String::new(),
            chunks: 0,
            tokens: None,
            asked: Instant::now(),
            span: None,
        }
    }

    fn add(&mut self, text: &str, at: Instant) {
        let first = self.span.map_or(at, |(first, _)| first);
        self.span = Some((first, at));
        self.text.push_str(text);
        self.chunks += 1;
    }

    /// Tokens, their rate after the first, and the time to the first.
    fn figures(&self) -> Option<String> {
        let (first, last) = self.span?;
        // Most servers send one token a chunk.
        let tokens = self.tokens.unwrap_or(self.chunks);
        let mut figures = match tokens {
            1 => "1 token".to_owned(),
            _ => format!("{tokens} tokens"),
        };
        let seconds = (last - first).as_secs_f64();
        if tokens > 1 && seconds > 0.0 {
            figures += &format!(", {:.1} tokens/s", (tokens - 1) as f64 / seconds);
        }
        let ttft = (first - self.asked).as_secs_f64() * 1e3;
        Some(figures + &format!(", first after {ttft:.0} ms"))
    }
}

fn show(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    written.context("can't write the answer")
}

/// Without control characters: a model must not be able to steer the terminal.
fn printable(text: &str) -> String {
    let safe = |c: char| match c {
        '\n' | '\t' => c,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(safe).collect()
}

fn dim(text: &str) -> String {
    match std::io::stderr().is_terminal() {
        true => format!("\x1b[2m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}

/// Lines of standard input, read on a thread of their own: a blocked read can't be called off.
fn stdin_lines() -> Result<mpsc::Receiver<String>> {
    let (sender, lines) = mpsc::channel(1);
    let read = move || {
        for line in std::io::stdin().lock().lines() {
            match line {
                Ok(line) => {
                    if sender.blocking_send(line).is_err() {
                        return;
                    }
                }
                Err(e) => {
                    eprintln!("can't read standard input: {e}");
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("stdin".into())
        .spawn(read)
        .context("can't start the thread that reads standard input")?;
    Ok(lines)
}

#[cfg(test)]
mod tests;
