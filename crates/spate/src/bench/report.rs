//! What was measured: a table for people, JSON for programs.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// One finished request. Times are from its sending.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Sample {
    /// To the first output token.
    pub(crate) ttft: Duration,
    /// To the last output token.
    pub(crate) total: Duration,
    /// Between one chunk with tokens and the next.
    pub(crate) gaps: Vec<Duration>,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) output_tokens: u64,
}

/// A distribution, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Quantiles {
    /// `None` without values.
    fn of(values: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut values: Vec<f64> = values.map(|value| value.as_secs_f64() * 1e3).collect();
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        // Linear interpolation between the neighbouring ranks, as numpy's default does.
        let at = |share: f64| {
            let rank = share * (values.len() - 1) as f64;
            let (below, above) = (values[rank.floor() as usize], values[rank.ceil() as usize]);
            below + (above - below) * rank.fract()
        };
        Some(Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.50),
            p90: at(0.90),
            p99: at(0.99),
            max,
        })
    }
}

/// The result of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Report {
    pub(crate) completed: usize,
    pub(crate) failed: usize,
    /// How often each error came.
    pub(crate) errors: BTreeMap<String, usize>,
    pub(crate) duration_s: f64,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) output_tokens: u64,
    pub(crate) requests_per_s: f64,
    pub(crate) output_tokens_per_s: f64,
    pub(crate) total_tokens_per_s: f64,
    /// Time to first token.
    pub(crate) ttft_ms: Option<Quantiles>,
    /// Time per output token after the first, one value a request.
    pub(crate) tpot_ms: Option<Quantiles>,
    /// Inter-token latency: between chunks, all requests together.
    pub(crate) itl_ms: Option<Quantiles>,
    /// From sending to the last token.
    pub(crate) e2e_ms: Option<Quantiles>,
}

impl Report {
    pub(crate) fn new(samples: &[Sample], errors: BTreeMap<String, usize>, duration: Duration) -> Self {
        let sum = |count: fn(&Sample) -> u64| samples.iter().map(count).sum::<u64>();
        let (prompt_tokens, output_tokens) = (sum(|s| s.prompt_tokens), sum(|s| s.output_tokens));
        let seconds = duration.as_secs_f64();
        let tpot = samples
            .iter()
            .filter(|s| s.output_tokens > 1)
            .map(|s| (s.total - s.ttft).div_f64((s.output_tokens - 1) as f64));
        Self {
            completed: samples.len(),
            failed: errors.values().sum(),
            errors,
            duration_s: seconds,
            prompt_tokens,
            cached_tokens: sum(|s| s.cached_tokens),
            output_tokens,
            requests_per_s: samples.len() as f64 / seconds,
            output_tokens_per_s: output_tokens as f64 / seconds,
            total_tokens_per_s: (prompt_tokens + output_tokens) as f64 / seconds,
            ttft_ms: Quantiles::of(samples.iter().map(|s| s.ttft)),
            tpot_ms: Quantiles::of(tpot),
            itl_ms: Quantiles::of(samples.iter().flat_map(|s| s.gaps.iter().copied())),
            e2e_ms: Quantiles::of(samples.iter().map(|s| s.total)),
        }
    }

    /// The table.
    pub(crate) fn table(&self) -> String {
        let cached = match self.prompt_tokens {
            0 => 0.0,
            prompt => 100.0 * self.cached_tokens as f64 / prompt as f64,
        };
        let mut text = format!(
            "requests    {} completed, {} failed in {:.2} s ({:.2}/s)\n\
             tokens      {} prompt ({cached:.1} % cached), {} output\n\
             throughput  {:.1} output tok/s, {:.1} total tok/s\n\n\
             {:<12}{:>10}{:>10}{:>10}{:>10}{:>10}\n",
            self.completed,
            self.failed,
            self.duration_s,
            self.requests_per_s,
            self.prompt_tokens,
            self.output_tokens,
            self.output_tokens_per_s,
            self.total_tokens_per_s,
            "ms",
            "mean",
            "p50",
            "p90",
            "p99",
            "max",
        );
        let rows = [
            ("TTFT", self.ttft_ms),
            ("TPOT", self.tpot_ms),
            ("ITL", self.itl_ms),
            ("end to end", self.e2e_ms),
        ];
        for (name, quantiles) in rows {
            if let Some(q) = quantiles {
                text.push_str(&format!(
                    "{name:<12}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>10.2}\n",
                    q.mean, q.p50, q.p90, q.p99, q.max
                ));
            }
        }
        for (error, count) in &self.errors {
            text.push_str(&format!("{count} × {error}\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn quantiles_interpolate() {
        let q = Quantiles::of((1..=5).map(ms)).unwrap();
        assert_eq!((q.mean, q.p50, q.max), (3.0, 3.0, 5.0));
        assert!((q.p90 - 4.6).abs() < 1e-9);
        assert_eq!(Quantiles::of(std::iter::empty()), None);
    }

    #[test]
    fn rates_and_times_per_token() {
        let sample = Sample {
            ttft: ms(100),
            total: ms(1000),
            gaps: vec![ms(300); 3],
            prompt_tokens: 30,
            cached_tokens: 16,
            output_tokens: 10,
        };
        let single = Sample { output_tokens: 1, total: ms(100), gaps: vec![], ..sample.clone() };
        let report = Report::new(&[sample, single], BTreeMap::new(), ms(2000));
        assert_eq!(report.output_tokens_per_s, 5.5);
        assert_eq!(report.total_tokens_per_s, 35.5);
        // 900 ms for the nine tokens after the first; one token has no time per further token.
        assert_eq!(report.tpot_ms.unwrap().max, 100.0);
        assert!(report.table().contains("2 completed, 0 failed in 2.00 s"));
        assert!(report.table().contains("(53.3 % cached)"));
    }
}
