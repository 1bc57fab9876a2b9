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

/// With the output tokens per second that were measured without pacing.
const LOADS: [(&str, Load, Option<f64>); 9] = [
    ("512/128, c=8", closed(8, 32, 512, 128), Some(1199.0)),
    ("512/256, c=64", closed(64, 256, 512, 256), Some(6001.0)),
    ("512/256, c=256", closed(256, 512, 512, 256), Some(9283.0)),
    ("2112/128, c=64, shared", SHARED, Some(3838.0)),
    ("8192/64, c=4", closed(4, 24, 8192, 64), Some(189.0)),
    ("64/700, c=16, flood", FLOOD, Some(1891.0)),
    ("200/300, c=64", closed(64, 384, 200, 300), None),
    ("1024/256, c=128", closed(128, 512, 1024, 256), None),
    ("4096/128, c=32", closed(32, 128, 4096, 128), None),
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
        let ratio = measured.map_or(1.0, |measured| outcome.rate / measured);
        assert!((0.91..1.03).contains(&ratio), "{name}: {ratio:.3} of it");
    }
}

#[test]
fn paced_steps_serve_every_load_better() {
    for (name, load, _) in LOADS {
        let (whole, paced) = (run(&load, None), run(&load, Some(STEP_TOKENS)));
        print(name, "paced", &paced);
        assert!(paced.rate > 0.96 * whole.rate, "{name}: fewer tokens");
        let [.., p99] = paced.itl;
        assert!(p99 < 36.0, "{name}: streams wait for {p99:.1} ms");
    }
}
