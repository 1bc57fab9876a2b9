//! How long steps take.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use spate_cuda::Overlap;
use spate_executor::{Executor, Lane};
use spate_model::{DummyModel, HfDirectory};
use spate_types::SamplingParams;

use crate::rig::{Load, Rig, Sequence, load, tokens};

/// Decode steps of which the medians are given.
const STEPS: usize = 40;

/// Positions before the decoded ones.
const CONTEXT: u32 = 512;

const OFF: Load = Load {
    slots: 256,
    max_batch_tokens: 8192,
    max_seq_len: 16_384,
    kv_cache_bytes: None,
    overlap: Overlap::Off,
    graphs: true,
};

/// What was seen of a series of steps.
#[derive(Default)]
struct Series {
    busy: Vec<Duration>,
    /// From the end of a step to the start of the next.
    idle: Vec<Duration>,
    /// Of the host, per submitted step.
    submit: Vec<Duration>,
    wall: Duration,
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn us(d: Duration) -> f64 {
    d.as_secs_f64() * 1e6
}

fn open(directory: &Path, with: Load) -> Result<Rig> {
    let model = DummyModel::new(&HfDirectory::open(directory)?, 1)?;
    let start = Instant::now();
    let executor = load(&model, with)?;
    let capacity = executor.capacity();
    println!(
        "{:?}, graphs {}: loaded in {:.1?}, {} KV blocks",
        with.overlap,
        with.graphs,
        start.elapsed(),
        capacity.blocks
    );
    for (what, bytes) in executor.memory_budget() {
        println!("  {what}: {} MiB", bytes >> 20);
    }
    Ok(Rig::new(executor))
}

fn fill(rig: &mut Rig, rows: u32, prompt: u32, room: u32) -> Result<()> {
    let vocab = rig.executor.capacity().vocab_size;
    for i in 0..rows {
        rig.add(
            tokens(i, prompt, vocab),
            SamplingParams::default(),
            prompt + room,
        );
    }
    rig.prefill(8192)
}

/// Decodes all sequences, two steps in flight.
fn run(rig: &mut Rig, steps: usize) -> Result<Series> {
    run_on(Lane::Main, rig, steps)
}

fn run_on(lane: Lane, rig: &mut Rig, steps: usize) -> Result<Series> {
    let which: Vec<usize> = (0..rig.sequences.len()).collect();
    let mut series = Series::default();
    let start = Instant::now();
    let mut before = None;
    for step in 0..steps + 1 {
        if step < steps {
            series.submit.push(rig.decode_on(lane, &which)?);
        }
        if step > 0 {
            let (_, done) = rig.wait()?;
            series.busy.push(done.busy);
            let ran = rig.executor.last_step(lane).context("a lane")?;
            if let Some(before) = before.replace(ran.end) {
                let idle = ran.start.saturating_sub(before);
                series.idle.push(Duration::from_nanos(idle));
            }
        }
    }
    series.wall = start.elapsed() / steps as u32;
    Ok(series)
}

/// Decode steps with and without graphs, and prompts.
pub(crate) fn decodes(directory: &Path) -> Result<()> {
    for graphs in [true, false] {
        let mut rig = open(directory, Load { graphs, ..OFF })?;
        println!(
            "  rows  busy ms  wall ms  idle us  submit us (medians of {STEPS} steps, {CONTEXT} positions)"
        );
        for rows in [1, 8, 64, 256] {
            fill(&mut rig, rows, CONTEXT, 2 * STEPS as u32)?;
            run(&mut rig, 5)?;
            let series = run(&mut rig, STEPS)?;
            println!(
                "  {rows:4}  {:7.3}  {:7.3}  {:7.1}  {:9.1}",
                ms(median(series.busy)),
                ms(series.wall),
                us(median(series.idle)),
                us(median(series.submit)),
            );
            rig.clear();
        }
        if graphs {
            prompts(&mut rig)?;
        }
    }
    Ok(())
}

/// Steps in which prompts of 512 tokens come bit by bit beside decodes, with and without graphs.
pub(crate) fn mixed(directory: &Path) -> Result<()> {
    for graphs in [true, false] {
        let mut rig = open(directory, Load { graphs, ..OFF })?;
        println!("  decodes + prompt tokens  busy ms  idle us  submit us");
        for [rows, chunk] in [[0, 16], [0, 512], [64, 192], [64, 448], [192, 320]] {
            fill(&mut rig, rows, CONTEXT, 2 * STEPS as u32)?;
            let series = run_mixed(&mut rig, rows as usize, [chunk, CONTEXT])?;
            println!(
                "  {rows:7} + {chunk:13}  {:7.3}  {:7.1}  {:9.1}",
                ms(median(series.busy)),
                us(median(series.idle)),
                us(median(series.submit)),
            );
            rig.clear();
        }
    }
    Ok(())
}

/// The same steps for seconds, as under load: a GPU lowers its clocks to stay within its power.
pub(crate) fn sustained(directory: &Path) -> Result<()> {
    const SECONDS: f64 = 2.0;
    const FIRST: usize = 8;
    let mut rig = open(directory, Load { slots: 320, ..OFF })?;
    println!(
        "  decodes at positions + tokens of prompts of length: ms, the first {FIRST}, the last half; steps"
    );
    for [rows, context, chunk, prompt] in [
        [0, 0, 512, 512],
        [0, 0, 2048, 2048],
        [64, 640, 0, 1],
        [64, 640, 448, 512],
        [256, 640, 0, 1],
        [250, 640, 518, 512],
        [3, 8192, 509, 8192],
    ] {
        fill(&mut rig, rows, context, 1024)?;
        let begun = Instant::now();
        let mut busy = Vec::new();
        while begun.elapsed().as_secs_f64() < SECONDS {
            if busy.is_empty() {
                std::thread::sleep(Duration::from_millis(500));
            }
            busy.extend(run_mixed(&mut rig, rows as usize, [chunk, prompt])?.busy);
            rig.truncate(rows as usize);
        }
        println!(
            "  {rows:3} at {context:4} + {chunk:4} of {prompt:4}: {:7.3}, {:7.3}; {}",
            ms(median(busy[..FIRST].to_vec())),
            ms(median(busy[busy.len() / 2..].to_vec())),
            busy.len()
        );
        rig.clear();
    }
    Ok(())
}

/// Decodes the first sequences; beside them `chunk` tokens of new prompts of some length in each step.
fn run_mixed(rig: &mut Rig, decodes: usize, [chunk, length]: [u32; 2]) -> Result<Series> {
    let vocab = rig.executor.capacity().vocab_size;
    let (mut series, mut before) = (Series::default(), None);
    for step in 0..STEPS + 1 {
        if step < STEPS {
            let mut which: Vec<usize> = (0..decodes).collect();
            let mut rows: Vec<_> = which
                .iter()
                .map(|&i| rig.sequences[i].decode_row())
                .collect();
            let mut left = chunk;
            while left > 0 {
                let done = |s: &Sequence| s.len >= s.prompt_len();
                if rig.sequences.last().is_none_or(done) {
                    let seed = 1000 + rig.sequences.len() as u32;
                    let prompt = tokens(seed, length, vocab);
                    rig.add(prompt, SamplingParams::default(), length);
                }
                let sequence = rig.sequences.last_mut().context("one was added")?;
                let row = sequence.prompt_row(left);
                left -= row.input.len() as u32;
                rows.push(row);
                which.push(rig.sequences.len() - 1);
            }
            series.submit.push(rig.submit(Lane::Main, which, rows)?);
        }
        if step > 0 {
            let (_, done) = rig.wait()?;
            series.busy.push(done.busy);
            let ran = rig.executor.last_step(Lane::Main).context("a lane")?;
            if let Some(before) = before.replace(ran.end) {
                let idle = ran.start.saturating_sub(before);
                series.idle.push(Duration::from_nanos(idle));
            }
        }
    }
    Ok(series)
}

fn prompts(rig: &mut Rig) -> Result<()> {
    let vocab = rig.executor.capacity().vocab_size;
    println!("  prompt tokens  busy ms  submit us");
    for prompt in [16, 128, 512, 2048, 8192] {
        let (mut busy, mut submit) = (Vec::new(), Vec::new());
        for round in 0..4 {
            let i = rig.add(
                tokens(round, prompt, vocab),
                SamplingParams::default(),
                prompt,
            );
            let rows = vec![rig.sequences[i].prompt_row(prompt)];
            submit.push(rig.submit(Lane::Main, vec![i], rows)?);
            busy.push(rig.wait()?.1.busy);
            rig.clear();
        }
        println!(
            "  {prompt:13}  {:7.2}  {:9.1}",
            ms(median(busy)),
            us(median(submit))
        );
    }
    Ok(())
}

/// Sixteen sequences decode while prompts of 8192 tokens are computed.
pub(crate) fn overlap(directory: &Path) -> Result<()> {
    const PROMPT: u32 = 8192;
    println!(
        "16 rows decode; a prompt of {PROMPT} tokens comes; token intervals of the decodes meanwhile"
    );
    println!("  mode, prompt ms, intervals ms: median, longest; steps");
    let modes = [
        Overlap::Off,
        Overlap::Streams,
        Overlap::DecodeSms(16),
        Overlap::DecodeSms(24),
        Overlap::DecodeSms(32),
        Overlap::DecodeSms(48),
    ];
    for overlap in modes {
        let mut rig = open(directory, Load { overlap, ..OFF })?;
        fill(&mut rig, 16, CONTEXT, 600)?;
        run(&mut rig, 20)?;
        for _ in 0..2 {
            beside(&mut rig, overlap, PROMPT)?;
        }
    }
    Ok(())
}

fn beside(rig: &mut Rig, overlap: Overlap, prompt: u32) -> Result<()> {
    let vocab = rig.executor.capacity().vocab_size;
    let which: Vec<usize> = (0..16).collect();
    let long = rig.add(tokens(99, prompt, vocab), SamplingParams::default(), prompt);
    let (start, mut took) = (Instant::now(), None);
    let (mut tokens_at, mut submitted) = (vec![Instant::now()], false);
    let mut sent = 0;
    while took.is_none() || rig.in_flight(Lane::Main) > 0 {
        if took.is_none() && rig.in_flight(Lane::Main) < 2 {
            let mut rows: Vec<_> = which
                .iter()
                .map(|&i| rig.sequences[i].decode_row())
                .collect();
            let mut who = which.clone();
            sent += 1;
            // Two steps later than the decodes, so that these are under way.
            if !submitted && sent > 2 {
                submitted = true;
                match overlap {
                    Overlap::Off => {
                        rows.push(rig.sequences[long].prompt_row(prompt - 16));
                        who.push(long);
                    }
                    _ => {
                        let rows = vec![rig.sequences[long].prompt_row(prompt)];
                        rig.submit(Lane::Prefill, vec![long], rows)?;
                    }
                }
            }
            rig.submit(Lane::Main, who, rows)?;
            continue;
        }
        let (lane, done) = rig.wait()?;
        let had_prompt = lane == Lane::Prefill || done.outputs.len() > 16;
        if lane == Lane::Main {
            tokens_at.push(Instant::now());
        }
        if had_prompt {
            took = Some(start.elapsed());
        }
    }
    let intervals: Vec<Duration> = tokens_at.windows(2).map(|w| w[1] - w[0]).collect();
    println!(
        "  {overlap:?}: {:.1}; {:.2}, {:.2}; {}",
        ms(took.context("the prompt ended")?),
        ms(median(intervals.clone())),
        ms(intervals.iter().max().copied().unwrap_or_default()),
        intervals.len()
    );
    let long = rig.sequences.pop().context("it was added last")?;
    rig.executor.release(long.slot);
    Ok(())
}

/// Decode steps on a part of the GPU while nothing runs on the rest.
pub(crate) fn part(directory: &Path) -> Result<()> {
    for rest in [84, 100, 116] {
        let overlap = Overlap::DecodeSms(rest);
        let mut rig = open(directory, Load { overlap, ..OFF })?;
        fill(&mut rig, 16, CONTEXT, 128)?;
        run_on(Lane::Prefill, &mut rig, 5)?;
        let series = run_on(Lane::Prefill, &mut rig, STEPS)?;
        println!("  all but {rest} SMs: {:.2} ms", ms(median(series.busy)));
    }
    Ok(())
}

/// Steps without graphs, for a profiler that shows kernels; few layers are enough.
pub(crate) fn profile(directory: &Path) -> Result<()> {
    let with = Load {
        graphs: false,
        kv_cache_bytes: Some(4 << 30),
        ..OFF
    };
    let mut rig = open(directory, with)?;
    for rows in [1, 64, 256] {
        fill(&mut rig, rows, CONTEXT, 32)?;
        run(&mut rig, 2)?;
        rig.clear();
    }
    prompts(&mut rig)
}
