//! When requests are sent: as others finish (closed loop) or as a clock says (open loop).

use std::fmt;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::measure::{Outcome, measure};
use super::workload::{Random, Workload};
use crate::client::Client;

/// How load is made.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(tag = "load", rename_all = "lowercase")]
pub(super) enum Load {
    /// So many requests at once: the next is sent when one has finished.
    Closed { concurrency: NonZeroU32 },
    /// So many requests a second in the mean, whether or not earlier ones have finished.
    Open { rate: f64 },
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { concurrency } => write!(f, "{concurrency} at once"),
            Self::Open { rate } => write!(f, "{rate} a second (Poisson)"),
        }
    }
}

/// Sends the requests of these numbers; gives their outcomes in order of completion. When
/// `interrupt` resolves, what still runs is dropped, and the second value is true.
pub(super) async fn drive(
    client: &Arc<Client>,
    workload: &Arc<Workload>,
    load: Load,
    numbers: Range<u64>,
    interrupt: impl Future<Output = ()>,
    mut progress: impl FnMut(u64),
) -> (Vec<Outcome>, bool) {
    let (done, mut finished) = unbounded_channel();
    let sender = Sender {
        client: client.clone(),
        workload: workload.clone(),
        done,
    };
    // Dropped at the end of this function: that ends what is still running.
    let _running = match load {
        Load::Closed { concurrency } => closed_loop(sender, numbers, concurrency),
        Load::Open { rate } => {
            let mut clock = JoinSet::new();
            clock.spawn(open_loop(sender, numbers, rate));
            clock
        }
    };
    let mut outcomes = Vec::new();
    tokio::pin!(interrupt);
    loop {
        tokio::select! {
            outcome = finished.recv() => match outcome {
                Some(outcome) => outcomes.push(outcome),
                None => return (outcomes, false),
            },
            () = &mut interrupt => return (outcomes, true),
        }
        progress(outcomes.len() as u64);
    }
}

/// Sends single requests. The run is over when no clone of it is left.
#[derive(Clone)]
struct Sender {
    client: Arc<Client>,
    workload: Arc<Workload>,
    done: UnboundedSender<Outcome>,
}

impl Sender {
    async fn send(&self, number: u64) {
        let outcome = measure(&self.client, self.workload.request(number)).await;
        // Nobody receives any more when the run was interrupted.
        let _interrupted = self.done.send(outcome);
    }
}

fn closed_loop(sender: Sender, numbers: Range<u64>, concurrency: NonZeroU32) -> JoinSet<()> {
    let workers = u64::from(concurrency.get()).min(numbers.end - numbers.start);
    let next = Arc::new(AtomicU64::new(numbers.start));
    (0..workers)
        .map(|_| {
            let (sender, next, end) = (sender.clone(), next.clone(), numbers.end);
            async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= end {
                        return;
                    }
                    sender.send(number).await;
                }
            }
        })
        .collect()
}

async fn open_loop(sender: Sender, numbers: Range<u64>, rate: f64) {
    // Apart from the streams that make prompts, which start from other seeds.
    let mut random = Random::new(!sender.workload.seed);
    let mut running = JoinSet::new();
    let mut due = Instant::now();
    for number in numbers {
        // By the schedule, not from the last request: one that is late does not delay the rest.
        sleep_until(due).await;
        let sender = sender.clone();
        running.spawn(async move { sender.send(number).await });
        due += random.gap(rate);
        while running.try_join_next().is_some() {}
    }
    running.join_all().await;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::future::pending;
    use std::time::Duration;

    use super::super::report::Report;
    use super::*;
    use crate::client::test_server::{Received, Reply, start};

    const DONE: &str = "data: [DONE]\n\n";

    /// Two tokens, three times, with all the fields that servers send.
    fn answer(pause: Duration) -> Reply {
        let chunk = "data: {\"id\":\"c\",\"object\":\"text_completion\",\"choices\":[{\"index\":0,\
                     \"text\":\"a b\",\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n";
        let end = "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\n\n";
        let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":6,\
                     \"total_tokens\":16,\"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n";
        let mut reply = Reply::sse(&[chunk, chunk, ": ping\n\n", chunk, end, usage, DONE]);
        reply.pause = pause;
        reply
    }

    async fn run(
        load: Load,
        requests: u64,
        interrupt: impl Future<Output = ()>,
        handler: impl Fn(&Received) -> Reply + Send + Sync + 'static,
    ) -> (Report, usize) {
        let (url, seen) = start(handler).await;
        let client = Arc::new(Client::new(&url, None).unwrap());
        let workload = Arc::new(Workload::for_tests());
        let start = Instant::now();
        let (outcomes, _) = drive(&client, &workload, load, 0..requests, interrupt, |_| {}).await;
        let most_running = seen.most_running.load(Ordering::SeqCst);
        (
            Report::new(requests, outcomes, start.elapsed()),
            most_running,
        )
    }

    fn closed(concurrency: u32) -> Load {
        let concurrency = NonZeroU32::new(concurrency).unwrap();
        Load::Closed { concurrency }
    }

    #[tokio::test]
    async fn a_closed_loop_keeps_its_concurrency() {
        let pause = Duration::from_millis(5);
        let (report, most_running) = run(closed(3), 9, pending(), move |_| answer(pause)).await;
        assert_eq!(most_running, 3);
        assert_eq!(
            (report.completed, report.failed, report.unfinished),
            (9, 0, 0)
        );
        assert_eq!((report.prompt_tokens, report.cached_tokens), (90, 36));
        assert_eq!((report.output_tokens, report.chunks), (54, 27));
        // The workload asks for 16 tokens: an answer of 6 is not what was measured for.
        assert_eq!((report.other_length, report.without_usage), (9, 0));
        let (ttft, e2e) = (report.ttft_ms.unwrap(), report.e2e_ms.unwrap());
        assert!(
            ttft.p50 >= 9.0 && e2e.p50 >= ttft.p50 + 14.0,
            "{ttft:?} {e2e:?}"
        );
    }

    #[tokio::test]
    async fn an_open_loop_does_not_wait_for_answers() {
        let pause = Duration::from_millis(20);
        let load = Load::Open { rate: 1e4 };
        let (report, most_running) = run(load, 20, pending(), move |_| answer(pause)).await;
        assert_eq!(report.completed, 20);
        assert!(most_running > 10, "{most_running}");
    }

    #[tokio::test]
    async fn errors_are_counted_by_kind() {
        let count = AtomicU64::new(0);
        let handler = move |_: &Received| match count.fetch_add(1, Ordering::Relaxed) % 4 {
            0 => Reply::json("429 Too Many Requests", r#"{"error":{"message":"full"}}"#),
            1 => Reply::sse(&["data: {\"error\":{\"message\":\"request 7 died\"}}\n\n"]),
            2 => Reply::sse(&[DONE]),
            _ => answer(Duration::ZERO),
        };
        let (report, _) = run(closed(1), 8, pending(), handler).await;
        assert_eq!((report.completed, report.failed), (2, 6));
        let kinds: Vec<_> = report
            .errors
            .iter()
            .map(|(kind, e)| (kind.as_str(), e.count))
            .collect();
        assert_eq!(
            kinds,
            [
                ("HTTP 429", 2),
                ("error in stream", 2),
                ("malformed answer", 2)
            ]
        );
        assert!(
            report
                .to_string()
                .contains("error: 2 × HTTP 429, first: full"),
            "{report}"
        );
    }

    #[tokio::test]
    async fn an_interrupted_run_keeps_what_it_has() {
        let count = AtomicU64::new(0);
        let handler = move |_: &Received| match count.fetch_add(1, Ordering::Relaxed) {
            0..4 => answer(Duration::ZERO),
            _ => answer(Duration::from_secs(3600)),
        };
        let interrupt = tokio::time::sleep(Duration::from_millis(300));
        let (report, _) = run(closed(2), 100, interrupt, handler).await;
        assert_eq!(
            (report.completed, report.failed, report.unfinished),
            (4, 0, 96)
        );
    }
}
