//! Prometheus metrics, under the names that dashboards, autoscalers and routers for vLLM read.
//!
//! Labels are the model's name and the engine's index; no label holds anything that a client chose.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use spate_engine::{AdmitError, Event, Stats, StepReport};
use spate_types::{FinishReason, Micros, RequestId, Timings, Usage};

use crate::app::ServedModel;

const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_LATENCY: &[f64] = &[
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const STEP_SECONDS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0,
];
const ITERATION_TOKENS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const COUNTS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];
/// Up to any context length of today; a 1-2-5 series.
const TOKEN_COUNTS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
    5e5, 1e6,
];

/// Everything `/metrics` shows. Empty until an engine is attached.
pub(crate) struct Metrics {
    registry: Registry,
    engine: OnceLock<Arc<EngineMetrics>>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            registry: Registry::new(),
            engine: OnceLock::new(),
        }
    }

    /// Registers an engine's metrics and gives what fills them. Only the first engine's are kept.
    pub(crate) fn attach_engine(&self, model_name: &str) -> Recorder {
        let metrics = self.engine.get_or_init(|| {
            let metrics = EngineMetrics::register(&self.registry, model_name);
            metrics.set_gauges(&Stats::default());
            // A series that appears with its first event hides that event from `rate()`.
            for reason in ["stop", "length", "abort", "error"] {
                metrics.success.with_label_values(&[reason]);
            }
            for reason in ["queue_full", "draining", "engine_dead"] {
                metrics.rejections.with_label_values(&[reason]);
            }
            Arc::new(metrics)
        });
        Recorder {
            metrics: metrics.clone(),
            last: Stats::default(),
            live: HashMap::new(),
        }
    }

    pub(crate) fn engine(&self) -> Option<&Arc<EngineMetrics>> {
        self.engine.get()
    }

    /// What is known of the engine before its first step.
    pub(crate) fn set_capacity(&self, model: &ServedModel) {
        let Some(metrics) = self.engine.get() else {
            return;
        };
        let capacity = model.engine.capacity();
        let labels = [
            &capacity.block_size.to_string(),
            &capacity.blocks.to_string(),
            &model.engine.config().scheduler.prefix_caching.to_string(),
        ];
        metrics.cache_config.with_label_values(&labels).set(1);
        for (part, bytes) in &model.memory {
            let labels = [model.device.as_str(), part];
            metrics.memory.with_label_values(&labels).set(*bytes as i64);
        }
    }

    pub(crate) fn count_rejection(&self, e: &AdmitError) {
        if let Some(metrics) = self.engine.get() {
            let reason = match e {
                AdmitError::QueueFull { .. } => "queue_full",
                AdmitError::Draining => "draining",
                AdmitError::Dead(_) => "engine_dead",
            };
            metrics.rejections.with_label_values(&[reason]).inc();
        }
    }

    /// The Prometheus text format.
    pub(crate) fn render(&self) -> String {
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .expect("names and labels were checked when they were registered")
    }
}

macro_rules! engine_metrics {
    ($($field:ident: $kind:ty = $make:expr, $name:literal, $help:literal;)*) => {
        /// The metrics of one engine.
        pub(crate) struct EngineMetrics {
            $($field: $kind,)*
        }

        impl EngineMetrics {
            fn register(registry: &Registry, model_name: &str) -> Self {
                let labels = HashMap::from([
                    ("model_name".to_owned(), model_name.to_owned()),
                    ("engine".to_owned(), "0".to_owned()),
                ]);
                $(
                    let make: fn(Opts) -> prometheus::Result<$kind> = $make;
                    let $field = make(Opts::new($name, $help).const_labels(labels.clone()))
                        .and_then(|metric| registered(registry, metric))
                        .expect(concat!($name, " is a valid name, used once"));
                )*
                Self { $($field,)* }
            }
        }
    };
}

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn histogram(opts: Opts, buckets: &[f64]) -> prometheus::Result<Histogram> {
    let mut histogram = HistogramOpts::from(opts);
    histogram.buckets = buckets.to_vec();
    Histogram::with_opts(histogram)
}

engine_metrics! {
    running: IntGauge = IntGauge::with_opts,
        "vllm:num_requests_running", "Sequences in the running batch.";
    waiting: IntGauge = IntGauge::with_opts,
        "vllm:num_requests_waiting", "Sequences waiting to run.";
    waiting_by_reason: IntGaugeVec = |opts| IntGaugeVec::new(opts, &["reason"]),
        "vllm:num_requests_waiting_by_reason", "Sequences waiting to run, by what they wait for.";
    kv_usage: Gauge = Gauge::with_opts,
        "vllm:kv_cache_usage_perc", "Share of KV-cache blocks in use, 0 to 1; of the fuller pool where there are two.";
    gpu_usage: Gauge = Gauge::with_opts,
        "vllm:gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc.";
    pool_usage: GaugeVec = |opts| GaugeVec::new(opts, &["pool"]),
        "spate_kv_pool_usage", "Share of KV blocks in use, 0 to 1: main, and local for layers with a window.";
    cache_config: IntGaugeVec =
        |opts| IntGaugeVec::new(opts, &["block_size", "num_gpu_blocks", "enable_prefix_caching"]),
        "vllm:cache_config_info", "The KV cache's layout, as labels.";
    memory: IntGaugeVec = |opts| IntGaugeVec::new(opts, &["device", "part"]),
        "spate_memory_bytes", "Memory taken at start, by device and what it is for.";
    prefix_queries: IntCounter = IntCounter::with_opts,
        "vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache.";
    prefix_hits: IntCounter = IntCounter::with_opts,
        "vllm:prefix_cache_hits_total", "Tokens found in the prefix cache.";
    gpu_prefix_queries: IntCounter = IntCounter::with_opts,
        "vllm:gpu_prefix_cache_queries_total", "Older name of vllm:prefix_cache_queries_total.";
    gpu_prefix_hits: IntCounter = IntCounter::with_opts,
        "vllm:gpu_prefix_cache_hits_total", "Older name of vllm:prefix_cache_hits_total.";
    preemptions: IntCounter = IntCounter::with_opts,
        "vllm:num_preemptions_total", "Preemptions.";
    prompt_tokens: IntCounter = IntCounter::with_opts,
        "vllm:prompt_tokens_total", "Prompt tokens of requests that ran.";
    prompt_tokens_cached: IntCounter = IntCounter::with_opts,
        "vllm:prompt_tokens_cached_total", "Prompt tokens whose KV came from the prefix cache.";
    prompt_tokens_by_source: IntCounterVec = |opts| IntCounterVec::new(opts, &["source"]),
        "vllm:prompt_tokens_by_source_total", "Prompt tokens, by where their KV came from.";
    generation_tokens: IntCounter = IntCounter::with_opts,
        "vllm:generation_tokens_total", "Tokens generated.";
    success: IntCounterVec = |opts| IntCounterVec::new(opts, &["finished_reason"]),
        "vllm:request_success_total", "Sequences that ended, by reason.";
    rejections: IntCounterVec = |opts| IntCounterVec::new(opts, &["reason"]),
        "vllm:admission_rejections_total", "Requests refused at the door, by reason.";
    ttft: Histogram = |opts| histogram(opts, TTFT),
        "vllm:time_to_first_token_seconds", "Arrival to first token.";
    itl: Histogram = |opts| histogram(opts, TOKEN_LATENCY),
        "vllm:inter_token_latency_seconds", "Time between two tokens of a sequence.";
    tpot: Histogram = |opts| histogram(opts, TOKEN_LATENCY),
        "vllm:request_time_per_output_token_seconds", "Mean time per output token after the first.";
    e2e: Histogram = |opts| histogram(opts, REQUEST_LATENCY),
        "vllm:e2e_request_latency_seconds", "Arrival to end.";
    queue_time: Histogram = |opts| histogram(opts, REQUEST_LATENCY),
        "vllm:request_queue_time_seconds", "Arrival to first step.";
    inference_time: Histogram = |opts| histogram(opts, REQUEST_LATENCY),
        "vllm:request_inference_time_seconds", "First step to end.";
    prefill_time: Histogram = |opts| histogram(opts, REQUEST_LATENCY),
        "vllm:request_prefill_time_seconds", "First step to first token.";
    decode_time: Histogram = |opts| histogram(opts, REQUEST_LATENCY),
        "vllm:request_decode_time_seconds", "First token to end.";
    request_prompt_tokens: Histogram = |opts| histogram(opts, TOKEN_COUNTS),
        "vllm:request_prompt_tokens", "Prompt tokens of a request.";
    request_generation_tokens: Histogram = |opts| histogram(opts, TOKEN_COUNTS),
        "vllm:request_generation_tokens", "Output tokens of a request.";
    request_max_generation_tokens: Histogram = |opts| histogram(opts, TOKEN_COUNTS),
        "vllm:request_max_num_generation_tokens", "Output tokens of a request's longest sequence.";
    request_params_n: Histogram = |opts| histogram(opts, COUNTS),
        "vllm:request_params_n", "The parameter n of requests.";
    request_params_max_tokens: Histogram = |opts| histogram(opts, TOKEN_COUNTS),
        "vllm:request_params_max_tokens", "The most output tokens that requests may have.";
    request_preemptions: Histogram = |opts| histogram(opts, &[0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]),
        "vllm:request_num_preemptions", "Preemptions of a request.";
    request_prefill_computed: Histogram = |opts| histogram(opts, TOKEN_COUNTS),
        "vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not cached.";
    iteration_tokens: Histogram = |opts| histogram(opts, ITERATION_TOKENS),
        "vllm:iteration_tokens_total", "Input tokens of a step.";
    step_sequences: Histogram = |opts| histogram(opts, COUNTS),
        "spate_step_sequences", "Sequences in a step.";
    step_busy: Histogram = |opts| histogram(opts, STEP_SECONDS),
        "spate_step_busy_seconds", "Time the device worked on a step.";
}

impl EngineMetrics {
    /// Notes the parameters of a request that goes to the engine.
    pub(crate) fn request_submitted(&self, n: u32, max_tokens: u32) {
        self.request_params_n.observe(f64::from(n));
        self.request_params_max_tokens
            .observe(f64::from(max_tokens));
    }

    fn set_gauges(&self, stats: &Stats) {
        self.running.set(i64::from(stats.running));
        self.waiting.set(i64::from(stats.waiting));
        self.waiting_by_reason
            .with_label_values(&["capacity"])
            .set(i64::from(stats.waiting));
        let share = |used: u32, total: u32| f64::from(used) / f64::from(total.max(1));
        let pool_usage = |pool| self.pool_usage.with_label_values(&[pool]);
        let mut usage = share(stats.blocks_used, stats.blocks_total);
        pool_usage("main").set(usage);
        if stats.local_blocks_total > 0 {
            let local = share(stats.local_blocks_used, stats.local_blocks_total);
            pool_usage("local").set(local);
            // Whichever runs out first holds new sequences back.
            usage = usage.max(local);
        }
        self.kv_usage.set(usage);
        self.gpu_usage.set(usage);
    }

    fn add_counters(&self, last: &Stats, now: &Stats) {
        let grown = |field: fn(&Stats) -> u64| field(now).saturating_sub(field(last));
        let queries = grown(|s| s.prefix_queries_tokens);
        let hits = grown(|s| s.prefix_hit_tokens);
        self.prefix_queries.inc_by(queries);
        self.gpu_prefix_queries.inc_by(queries);
        self.prefix_hits.inc_by(hits);
        self.gpu_prefix_hits.inc_by(hits);
        self.preemptions.inc_by(grown(|s| s.preemptions));
        self.generation_tokens
            .inc_by(grown(|s| s.generation_tokens));
        let prompt = grown(|s| s.prompt_tokens);
        let cached = grown(|s| s.cached_prompt_tokens);
        self.prompt_tokens.inc_by(prompt);
        self.prompt_tokens_cached.inc_by(cached);
        for (source, tokens) in [
            ("local_compute", prompt.saturating_sub(cached)),
            ("local_cache_hit", cached),
        ] {
            self.prompt_tokens_by_source
                .with_label_values(&[source])
                .inc_by(tokens);
        }
    }

    fn count_finish(&self, reason: FinishReason) {
        let reason = match reason {
            FinishReason::Stop(_) => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
            FinishReason::Deadline | FinishReason::Error => "error",
        };
        self.success.with_label_values(&[reason]).inc();
    }

    /// Takes in a request that is done. What it never reached (a step, a token) is not observed.
    fn request_done(&self, usage: &Usage, times: &Timings, longest: u32) {
        let observe = |histogram: &Histogram, from: Micros, to: Micros| {
            if from != 0 && to >= from {
                histogram.observe(seconds(to - from));
            }
        };
        observe(&self.queue_time, times.arrived, times.scheduled);
        observe(&self.ttft, times.arrived, times.first_token);
        observe(&self.prefill_time, times.scheduled, times.first_token);
        observe(&self.decode_time, times.first_token, times.finished);
        observe(&self.inference_time, times.scheduled, times.finished);
        observe(&self.e2e, times.arrived, times.finished);
        if longest > 1 {
            let decode = times.finished.saturating_sub(times.first_token);
            self.tpot.observe(seconds(decode) / f64::from(longest - 1));
        }
        self.request_prompt_tokens
            .observe(f64::from(usage.prompt_tokens));
        self.request_generation_tokens
            .observe(f64::from(usage.completion_tokens));
        self.request_max_generation_tokens
            .observe(f64::from(longest));
        self.request_preemptions
            .observe(f64::from(times.preemptions));
        self.request_prefill_computed.observe(f64::from(
            usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        ));
    }
}

fn seconds(micros: Micros) -> f64 {
    micros as f64 / 1e6
}

/// Turns step reports into metrics.
pub(crate) struct Recorder {
    metrics: Arc<EngineMetrics>,
    last: Stats,
    live: HashMap<RequestId, Vec<SequenceTrack>>,
}

/// One sequence of a live request, at its `index`.
#[derive(Clone, Copy, Default)]
struct SequenceTrack {
    last_token: Micros,
    tokens: u32,
}

impl Recorder {
    pub(crate) fn observe(&mut self, report: &StepReport) {
        self.metrics.set_gauges(&report.stats);
        self.metrics.add_counters(&self.last, &report.stats);
        self.last = report.stats;
        if report.lane.is_some() {
            let metrics = &self.metrics;
            metrics
                .iteration_tokens
                .observe(f64::from(report.batch_tokens));
            metrics.step_sequences.observe(f64::from(report.batch_rows));
            metrics.step_busy.observe(report.busy.as_secs_f64());
        }
        for event in &report.events {
            match event {
                Event::Token { seq, .. } => {
                    let tracks = self.live.entry(seq.request).or_default();
                    let index = seq.index as usize;
                    if tracks.len() <= index {
                        tracks.resize(index + 1, SequenceTrack::default());
                    }
                    let track = &mut tracks[index];
                    if track.tokens > 0 {
                        let gap = report.now.saturating_sub(track.last_token);
                        self.metrics.itl.observe(seconds(gap));
                    }
                    track.last_token = report.now;
                    track.tokens += 1;
                }
                Event::PromptLogprobs { .. } => {}
                Event::Finished { reason, .. } => self.metrics.count_finish(*reason),
                Event::Done {
                    request,
                    usage,
                    timings,
                } => {
                    let tracks = self.live.remove(request).unwrap_or_default();
                    let longest = tracks.iter().map(|t| t.tokens).max().unwrap_or(0);
                    self.metrics.request_done(usage, timings, longest);
                }
            }
        }
    }
}
