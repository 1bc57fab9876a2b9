//! What the number of prompt tokens beside decodes does to throughput and latency: the scheduler under the
//! workloads of `benches/RESULTS.md`, on a model of an H100's step times. Nothing is timed, so the
//! figures are the same everywhere. To see them:
//! `cargo test -p spate-scheduler --test pacing -- --nocapture`.
#![allow(clippy::unwrap_used)]

mod device;
mod load;

use load::{Load, Outcome, run};

/// What the model's H100 has.
const STEP_TOKENS: u32 = 256;

const fn closed(clients: u32, requests: u32, prompt: u32, output: u32) -> Load {
    Load {
        clients,
        requests,
        prompt,
        output,
        shared: 0,
        flood: 0,
    }
}

const SHARED: Load = Load {
    shared: 2048,
    ..closed(64, 256, 2112, 128)
};

const FLOOD: Load = Load {
    flood: 16,
    ..closed(16, 32, 64, 700)
};

/// With the output tokens per second that were measured before steps were paced.
const LOADS: [(&str, Load, f64); 6] = [
    ("512/128, c=8", closed(8, 32, 512, 128), 1199.0),
    ("512/256, c=64", closed(64, 256, 512, 256), 5958.0),
    ("512/256, c=256", closed(256, 768, 512, 256), 9198.0),
    ("2112/128, c=64, shared", SHARED, 3838.0),
    ("8192/64, c=4", closed(4, 24, 8192, 64), 186.0),
    ("64/700, c=16, flood", FLOOD, 1891.0),
];

fn print(name: &str, how: &str, outcome: &Outcome) {
    let Outcome {
        rate,
        ttft: [mean, p50, p99],
        itl: [_, itl_p50, itl_p99],
    } = outcome;
    println!(
        "{name:<23} {how:<8} {rate:5.0} tokens/s   TTFT mean {mean:4.0}, p50 {p50:4.0}, p99 {p99:4.0} ms   \
         ITL p50 {itl_p50:4.1}, p99 {itl_p99:5.1} ms"
    );
}

#[test]
fn the_model_is_near_what_was_measured() {
    for (name, load, measured) in LOADS {
        let outcome = run(&load, None);
        print(name, "whole", &outcome);
        let ratio = outcome.rate / measured;
        assert!((0.92..1.04).contains(&ratio), "{name}: {ratio:.3} of it");
    }
}

#[test]
fn paced_steps_serve_every_load_better() {
    for (name, load, _) in LOADS {
        let (whole, paced) = (run(&load, None), run(&load, Some(STEP_TOKENS)));
        print(name, "paced", &paced);
        assert!(paced.rate > 0.98 * whole.rate, "{name}: fewer tokens");
        let [mean, ..] = paced.ttft;
        // With 16 streams beside it a long prompt is computed in two steps' worth of tokens at once.
        let limit = if load.flood > 0 { 1.1 } else { 1.0 };
        assert!(mean < limit * whole.ttft[0], "{name}: first tokens later");
        let [.., p99] = paced.itl;
        assert!(p99 < 30.0, "{name}: streams wait for {p99:.1} ms");
    }
}

#[test]
fn steps_of_decodes_with_much_to_compute_cost_throughput_and_those_with_little_latency() {
    let load = closed(64, 256, 512, 256);
    let [little, chosen, much] = [64, STEP_TOKENS, 1024].map(|measure| run(&load, Some(measure)));
    assert!(chosen.rate > much.rate && chosen.itl[2] < much.itl[2]);
    assert!(chosen.ttft[0] < little.ttft[0]);
}
