//! What was found, for people and for programs.

use std::fmt;
use std::io::Write;

use serde::Serialize;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    /// Nothing to judge.
    Info,
    /// As it should be.
    Ok,
    /// It works, but not as well as it should.
    Warning,
    /// It does not work.
    Failure,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    pub(super) level: Level,
    pub(super) topic: &'static str,
    pub(super) text: String,
    /// What was measured, in the unit that the text names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) measured: Option<f64>,
    /// What the data sheet promises.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) nominal: Option<f64>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.level {
            Level::Info => "    ",
            Level::Ok => "ok  ",
            Level::Warning => "SLOW",
            Level::Failure => "FAIL",
        };
        write!(f, "{mark} {:<11} {}", self.topic, self.text)
    }
}

/// Everything that was found, shown as it is found unless it is for a program.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    /// What `spate serve` would use.
    pub(super) device: String,
    pub(super) verdict: String,
    /// The worst of the findings.
    level: Level,
    findings: Vec<Finding>,
    #[serde(skip)]
    is_silent: bool,
}

impl Report {
    pub(super) fn new(is_silent: bool) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let report = Self {
            version,
            device: "cpu".into(),
            verdict: String::new(),
            level: Level::Ok,
            findings: Vec::new(),
            is_silent,
        };
        report.say(&format!("Spate {version}\n"));
        report
    }

    fn say(&self, line: &str) {
        if !self.is_silent {
            // Nobody may be reading any more; what was found still decides the exit code.
            let _unread = writeln!(std::io::stdout(), "{line}");
        }
    }

    pub(super) fn level(&self) -> Level {
        self.level
    }

    pub(super) fn add(&mut self, level: Level, topic: &'static str, text: String) {
        self.push(Finding {
            level,
            topic,
            text,
            measured: None,
            nominal: None,
        });
    }

    /// A rate in `unit`s; `share` of the nominal one, if it is known, is enough.
    pub(super) fn add_rate(
        &mut self,
        (topic, what): (&'static str, &str),
        (measured, unit): (f64, &str),
        expected: Option<(f64, f64)>,
    ) {
        let text = format!("{measured:.0} {unit} {what}");
        let (level, text) = match expected {
            None => (Level::Info, text),
            Some((nominal, share)) => {
                let got = measured / nominal;
                let text = format!(
                    "{text}: {:.0} % of the {nominal:.0} on its data sheet",
                    got * 100.0
                );
                match got >= share {
                    true => (Level::Ok, text),
                    false => (
                        Level::Warning,
                        format!("{text}, {:.0} % is usual", share * 100.0),
                    ),
                }
            }
        };
        self.push(Finding {
            level,
            topic,
            text,
            measured: Some(measured),
            nominal: expected.map(|(nominal, _)| nominal),
        });
    }

    pub(super) fn push(&mut self, finding: Finding) {
        self.say(&finding.to_string());
        self.level = self.level.max(finding.level);
        self.findings.push(finding);
    }

    /// Says what all of it comes to.
    pub(super) fn conclude(&mut self) {
        let device = &self.device;
        self.verdict = match self.level {
            Level::Info | Level::Ok => {
                format!("everything works: `spate serve` uses {device}")
            }
            Level::Warning => format!(
                "`spate serve` works on {device}, but this machine is slower than it should be: \
                 other programs on it, a power or heat limit, or a narrow slot"
            ),
            Level::Failure => {
                let advice = match device.starts_with("cuda") {
                    true => "; `spate serve --device cpu` does not use the GPU",
                    false => "",
                };
                format!("do not serve from {device} before this is repaired{advice}")
            }
        };
        self.say(&format!("\n{}", self.verdict));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        let mut report = Report::new(true);
        report.add_rate(("copy", "within memory"), (3000.0, "GB/s"), None);
        assert_eq!(report.level(), Level::Ok);
        let expected = Some((3352.0, 0.8));
        report.add_rate(("copy", "within memory"), (3000.0, "GB/s"), expected);
        assert_eq!(report.level(), Level::Ok);
        report.add_rate(("copy", "within memory"), (2000.0, "GB/s"), expected);
        assert_eq!(report.level(), Level::Warning);
        let text = report.findings.last().map(Finding::to_string);
        let text = text.unwrap_or_default();
        assert!(text.starts_with("SLOW copy "), "{text}");
        assert!(
            text.ends_with("60 % of the 3352 on its data sheet, 80 % is usual"),
            "{text}"
        );
        report.conclude();
        assert!(report.verdict.contains("slower than it should be"));
        report.add(Level::Failure, "kernels", "a wrong result".into());
        report.conclude();
        assert!(report.verdict.starts_with("do not serve from cpu"));
    }
}
