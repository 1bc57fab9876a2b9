//! What is told while a model is fetched: a bar on a terminal, a line now and then elsewhere, and a
//! callback for the readiness probe.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

use crate::settings::units::format_size;

/// Receives the stage and its percentage, 0 to 100.
pub(crate) type Observer = Box<dyn FnMut(&str, f32) + Send>;

/// Shows one transfer after another on standard error.
pub(crate) struct Progress {
    observer: Observer,
    is_terminal: bool,
    bar: Option<ProgressBar>,
    stage: String,
    total: u64,
    /// The last line's percentage, where there is no bar.
    printed: u64,
}

impl Progress {
    /// Shows progress to people and to `observer`.
    pub(crate) fn new(observer: Observer) -> Self {
        Self {
            observer,
            is_terminal: std::io::stderr().is_terminal(),
            bar: None,
            stage: String::new(),
            total: 0,
            printed: 0,
        }
    }

    /// Shows progress to people only.
    pub(crate) fn to_people() -> Self {
        Self::new(Box::new(|_, _| {}))
    }

    /// One line.
    pub(crate) fn note(&mut self, line: &str) {
        self.end();
        // Nobody reads standard error: no reason to fail.
        let _unread = writeln!(std::io::stderr(), "{line}");
    }

    /// Begins a transfer of `total` bytes (0: unknown).
    pub(crate) fn begin(&mut self, stage: &str, total: u64) {
        self.end();
        (self.stage, self.total, self.printed) = (stage.to_owned(), total, 0);
        (self.observer)(stage, 0.0);
        if total == 0 {
            self.note(stage);
        } else if self.is_terminal {
            let template = "{msg}  [{bar:30}] {bytes}/{total_bytes} ({bytes_per_sec}, {eta})";
            let style = ProgressStyle::with_template(template)
                .expect("the template is constant and well formed")
                .progress_chars("=> ");
            let bar = ProgressBar::new(total)
                .with_style(style)
                .with_message(self.stage.clone());
            bar.tick();
            self.bar = Some(bar);
        } else {
            self.note(&format!("{stage} ({})", format_size(total)));
        }
    }

    /// `done` bytes of the transfer have come.
    pub(crate) fn at(&mut self, done: u64) {
        let percent = match self.total {
            0 => 0,
            total => (done.min(total) * 100) / total,
        };
        (self.observer)(&self.stage, percent as f32);
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if percent >= self.printed + 25 => {
                self.printed = percent - percent % 25;
                let line = format!("{}: {} %", self.stage, self.printed);
                self.note(&line);
            }
            None => {}
        }
    }

    /// The transfer ended, well or not.
    pub(crate) fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
