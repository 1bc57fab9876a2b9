//! What was measured: a table for people, JSON for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::measure::{Outcome, Sample};

/// A distribution, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Summary {
    /// `None` without values.
    fn of(values: impl Iterator<Item = Duration>) -> Option<Self> {
        Self::of_sorted(&sorted_ms(values))
    }

    fn of_sorted(values: &[f64]) -> Option<Self> {
        Some(Self {
            max: *values.last()?,
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(values, 50.0),
            p90: percentile(values, 90.0),
            p99: percentile(values, 99.0),
        })
    }
}

fn sorted_ms(values: impl Iterator<Item = Duration>) -> Vec<f64> {
    let mut values: Vec<f64> = values.map(|value| value.as_secs_f64() * 1e3).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Of sorted values, at least one; `percent` in 0 ..= 100. Interpolates linearly between the
/// neighbouring ranks (type 7 of Hyndman and Fan 1996, numpy's default).
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = percent / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    below + (above - below) * rank.fract()
}

/// Errors of one kind.
#[derive(Debug, Serialize)]
pub(super) struct Errors {
    pub(super) count: u64,
    /// What the first of them said.
    pub(super) first: String,
}

/// The result of a run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) completed: u64,
    pub(super) failed: u64,
    /// Neither completed nor failed: the run was interrupted.
    pub(super) unfinished: u64,
    /// By kind.
    pub(super) errors: BTreeMap<String, Errors>,
    pub(super) duration_s: f64,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
    /// Chunks with output. Fewer than tokens: the server put several tokens into a chunk.
    pub(super) chunks: u64,
    /// Answers of another length than was asked for.
    pub(super) other_length: u64,
    /// Answers without usage, whose tokens were counted as one a chunk.
    pub(super) without_usage: u64,
    pub(super) requests_per_s: f64,
    pub(super) output_tokens_per_s: f64,
    pub(super) total_tokens_per_s: f64,
    /// Time to first token.
    pub(super) ttft_ms: Option<Summary>,
    /// Time per output token after the first, one value a request.
    pub(super) tpot_ms: Option<Summary>,
    /// Inter-token latency: between chunks, of all requests together.
    pub(super) itl_ms: Option<Summary>,
    /// The same at each whole percentile, 0 to 100; empty without values.
    pub(super) itl_percentiles_ms: Vec<f64>,
    /// From sending to the last token.
    pub(super) e2e_ms: Option<Summary>,
}

impl Report {
    /// `requests` were to be sent; the outcomes came within `duration`.
    pub(super) fn new(requests: u64, outcomes: Vec<Outcome>, duration: Duration) -> Self {
        let unfinished = requests - outcomes.len() as u64;
        let mut samples = Vec::new();
        let mut errors = BTreeMap::<String, Errors>::new();
        for outcome in outcomes {
            match outcome {
                Ok(sample) => samples.push(sample),
                Err(e) => {
                    let first = || Errors {
                        count: 0,
                        first: e.to_string(),
                    };
                    errors.entry(e.kind()).or_insert_with(first).count += 1;
                }
            }
        }
        let sum = |of: fn(&Sample) -> u64| samples.iter().map(of).sum::<u64>();
        let count = |of: fn(&&Sample) -> bool| samples.iter().filter(of).count() as u64;
        let (prompt_tokens, output_tokens) = (sum(|s| s.prompt_tokens), sum(|s| s.output_tokens));
        let per_second = |count: u64| count as f64 / duration.as_secs_f64();
        let tpot = samples
            .iter()
            .filter(|s| s.output_tokens > 1)
            .map(|s| (s.e2e - s.ttft).div_f64((s.output_tokens - 1) as f64));
        let gaps = sorted_ms(samples.iter().flat_map(|s| s.gaps.iter().copied()));
        let percentiles = if gaps.is_empty() { 0..0 } else { 0..101 };
        Self {
            completed: samples.len() as u64,
            failed: errors.values().map(|errors| errors.count).sum(),
            unfinished,
            errors,
            duration_s: duration.as_secs_f64(),
            prompt_tokens,
            cached_tokens: sum(|s| s.cached_tokens),
            output_tokens,
            chunks: sum(Sample::chunks),
            other_length: count(|s| s.output_tokens != s.asked_tokens),
            without_usage: count(|s| !s.has_usage),
            requests_per_s: per_second(samples.len() as u64),
            output_tokens_per_s: per_second(output_tokens),
            total_tokens_per_s: per_second(prompt_tokens + output_tokens),
            ttft_ms: Summary::of(samples.iter().map(|s| s.ttft)),
            tpot_ms: Summary::of(tpot),
            itl_ms: Summary::of_sorted(&gaps),
            itl_percentiles_ms: percentiles.map(|p| percentile(&gaps, p.into())).collect(),
            e2e_ms: Summary::of(samples.iter().map(|s| s.e2e)),
        }
    }
}

/// The table.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (failed, seconds) = (self.failed, self.duration_s);
        write!(
            f,
            "requests    {} completed, {failed} failed",
            self.completed
        )?;
        if self.unfinished > 0 {
            write!(f, ", {} not finished", self.unfinished)?;
        }
        writeln!(f, " in {seconds:.2} s")?;
        let cached = 100.0 * self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64;
        let (prompt, output) = (self.prompt_tokens, self.output_tokens);
        writeln!(
            f,
            "tokens      {prompt} in ({cached:.1} % cached), {output} out"
        )?;
        writeln!(
            f,
            "throughput  {:.2} requests/s, {:.1} output tokens/s, {:.1} total tokens/s",
            self.requests_per_s, self.output_tokens_per_s, self.total_tokens_per_s
        )?;
        if self.completed > 0 {
            let (mean, max) = ("mean", "max");
            writeln!(
                f,
                "\n{:<12}{mean:>10}{:>10}{:>10}{:>10}{max:>10}",
                "ms", "p50", "p90", "p99"
            )?;
        }
        let rows = [
            ("TTFT", self.ttft_ms),
            ("TPOT", self.tpot_ms),
            ("ITL", self.itl_ms),
            ("E2E", self.e2e_ms),
        ];
        for (name, row) in rows {
            if let Some(Summary {
                mean,
                p50,
                p90,
                p99,
                max,
            }) = row
            {
                writeln!(
                    f,
                    "{name:<12}{mean:>10.2}{p50:>10.2}{p90:>10.2}{p99:>10.2}{max:>10.2}"
                )?;
            }
        }
        self.notes(f)
    }
}

impl Report {
    /// What a reader must know before trusting the figures.
    fn notes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.without_usage > 0 {
            let count = self.without_usage;
            writeln!(
                f,
                "note: {count} answers had no usage; their chunks were counted as tokens"
            )?;
        } else if self.chunks != self.output_tokens {
            let tokens = self.output_tokens as f64 / self.chunks.max(1) as f64;
            writeln!(f, "note: {tokens:.2} tokens a chunk; ITL is between chunks")?;
        }
        if self.other_length > 0 {
            let count = self.other_length;
            writeln!(
                f,
                "note: {count} answers had another length than was asked for"
            )?;
        }
        for (kind, Errors { count, first }) in &self.errors {
            let first = first.trim_start_matches(kind.as_str());
            let first = first.trim_start_matches([':', ' ']);
            writeln!(f, "error: {count} × {kind}, first: {first}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// The expected values are numpy.percentile's.
    #[test]
    fn percentiles() {
        let values = [15.0, 20.0, 35.0, 40.0, 50.0];
        for (percent, expected) in [
            (0.0, 15.0),
            (40.0, 29.0),
            (50.0, 35.0),
            (90.0, 46.0),
            (99.0, 49.6),
            (100.0, 50.0),
        ] {
            let value = percentile(&values, percent);
            assert!((value - expected).abs() < 1e-9, "p{percent}: {value}");
        }
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert_eq!(Summary::of(std::iter::empty()), None);
        let summary = Summary::of([5, 1, 4, 2, 3].into_iter().map(ms)).unwrap();
        assert_eq!((summary.mean, summary.p50, summary.max), (3.0, 3.0, 5.0));
    }

    #[test]
    fn rates_and_times_per_token() {
        let sample = Sample {
            ttft: ms(100),
            e2e: ms(1000),
            gaps: vec![ms(300); 3],
            prompt_tokens: 30,
            cached_tokens: 16,
            output_tokens: 10,
            asked_tokens: 10,
            has_usage: true,
        };
        let single = Sample {
            output_tokens: 1,
            e2e: ms(100),
            gaps: vec![],
            ..sample.clone()
        };
        let report = Report::new(3, vec![Ok(sample), Ok(single)], ms(2000));
        assert_eq!(
            (report.output_tokens_per_s, report.total_tokens_per_s),
            (5.5, 35.5)
        );
        // 900 ms for the nine tokens after the first; one token has no time per further token.
        assert_eq!(report.tpot_ms.unwrap().max, 100.0);
        assert_eq!(report.itl_percentiles_ms, vec![300.0; 101]);
        assert_eq!((report.chunks, report.other_length), (5, 1));
        let table = report.to_string();
        for line in [
            "2 completed, 0 failed, 1 not finished in 2.00 s",
            "60 in (53.3 % cached), 11 out",
            "2.20 tokens a chunk",
            "1 answers had another length",
        ] {
            assert!(table.contains(line), "{line}\n{table}");
        }
    }

    #[test]
    fn nothing_finished() {
        let report = Report::new(5, vec![], ms(10));
        assert_eq!((report.completed, report.unfinished), (0, 5));
        assert!(!report.to_string().contains("NaN"));
        assert!(
            serde_json::to_string(&report)
                .unwrap()
                .contains("\"ttft_ms\":null")
        );
    }
}
