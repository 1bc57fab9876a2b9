//! That graphs and lanes change no output.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use spate_cuda::{CudaExecutor, Overlap};
use spate_executor::{Lane, conformance};
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{GgmlType, Gguf};
use spate_types::{SampledToken, SamplingParams};

use crate::rig::{Load, Rig, load, tokens};

const OVERLAPS: [Overlap; 3] = [Overlap::Off, Overlap::Streams, Overlap::DecodeSms(32)];

/// The token that has no finite embedding.
const BROKEN: u32 = 200;

fn spec(architecture: &'static str) -> TinyLlama {
    TinyLlama {
        architecture,
        hidden: 128,
        head_dim: 64,
        ffn: 192,
        window: (architecture == "gemma3").then_some(40),
        weights: GgmlType::F16,
        value_weights: GgmlType::F16,
        ..TinyLlama::default()
    }
}

pub(crate) fn few() -> Result<()> {
    let file = TempFile::new(&tiny_llama(&spec("gemma3")));
    let gguf = Gguf::open(file.path())?;
    conformance::run(&mut || Box::new(small(&gguf, Overlap::Streams, true).expect("it loads")));
    graphs_change_nothing(&gguf)?;
    println!("ok");
    Ok(())
}

pub(crate) fn all() -> Result<ExitCode> {
    let mut failed = 0;
    for architecture in ["llama", "gemma3"] {
        let spec = spec(architecture);
        let file = TempFile::new(&tiny_llama(&spec));
        let gguf = Gguf::open(file.path())?;
        let broken = TempFile::new(&tiny_llama(&TinyLlama {
            nan_token: Some(BROKEN),
            ..spec
        }));
        let broken = Gguf::open(broken.path())?;
        let mut report = |what: &str, result: Result<()>| match result {
            Ok(()) => println!("ok   {architecture}: {what}"),
            Err(error) => {
                failed += 1;
                println!("FAIL {architecture}: {what}: {error:#}");
            }
        };
        for overlap in OVERLAPS {
            for graphs in [true, false] {
                let suite = std::panic::catch_unwind(|| {
                    conformance::run(&mut || {
                        Box::new(small(&gguf, overlap, graphs).expect("it loads"))
                    });
                });
                let suite = suite.map_err(|_| anyhow::anyhow!("see above"));
                report(&format!("conformance, {overlap:?}, graphs {graphs}"), suite);
            }
        }
        report("graphs give the same bits", graphs_change_nothing(&gguf));
        report(
            "a row that is not finite fails alone",
            failures_are_alone(&broken),
        );
        for overlap in &OVERLAPS[1..] {
            report(
                &format!("{overlap:?} gives the same bits"),
                lanes_change_nothing(&gguf, *overlap),
            );
        }
    }
    println!("{failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn small(gguf: &Gguf, overlap: Overlap, graphs: bool) -> Result<CudaExecutor> {
    let load_with = Load {
        slots: 24,
        max_batch_tokens: 256,
        max_seq_len: 0,
        kv_cache_bytes: Some(16 << 20),
        overlap,
        graphs,
    };
    Ok(load(gguf, load_with)?)
}

/// Every kind of sampling, by turns.
fn sampling(i: u32) -> SamplingParams {
    let plain = SamplingParams {
        logit_bias: vec![(BROKEN, -100.0)],
        ..SamplingParams::default()
    };
    match i % 4 {
        0 => plain,
        1 => SamplingParams {
            temperature: 0.9,
            top_p: 0.95,
            logprobs: Some(i % 5),
            ..plain
        },
        2 => SamplingParams {
            temperature: 0.7,
            top_k: 40,
            repetition_penalty: 1.2,
            presence_penalty: 0.3,
            ..plain
        },
        _ => SamplingParams {
            logprobs: Some(3),
            logit_bias: vec![(BROKEN, -100.0), (7, 3.0)],
            min_tokens: 4,
            min_tokens_banned: vec![2],
            ..plain
        },
    }
}

type Outputs = Vec<Vec<SampledToken>>;

/// Twenty sequences: the prompts of half of them come bit by bit, beside the others' decodes. Then they all
/// decode, from step to step fewer, so that graphs of all sizes run with all paddings.
fn decode(executor: CudaExecutor) -> Result<Outputs> {
    let mut rig = Rig::new(executor);
    for i in 0..10 {
        rig.add(tokens(i, 5 + 7 * i, BROKEN), sampling(i), 256);
    }
    rig.prefill(256)?;
    for i in 10..20 {
        rig.add(tokens(i, 5 + 7 * i, BROKEN), sampling(i), 256);
    }
    for late in (10..20).step_by(2) {
        for chunk in [3, 30, 60, 100, 200] {
            let mut which: Vec<usize> = (0..late).collect();
            let mut rows: Vec<_> = which
                .iter()
                .map(|&i| rig.sequences[i].decode_row())
                .collect();
            for i in [late, late + 1] {
                let sequence = &mut rig.sequences[i];
                if sequence.len < sequence.prompt_len() {
                    which.push(i);
                    rows.push(sequence.prompt_row(chunk));
                }
            }
            if rig.in_flight(Lane::Main) == 2 {
                rig.wait()?;
            }
            rig.submit(Lane::Main, which, rows)?;
        }
    }
    for step in 0..60 {
        let which: Vec<usize> = (step / 3..20).collect();
        if rig.in_flight(Lane::Main) == 2 {
            rig.wait()?;
        }
        rig.decode(&which)?;
    }
    while rig.in_flight(Lane::Main) > 0 {
        rig.wait()?;
    }
    ensure!(rig.sequences.iter().all(|s| !s.failed), "a row failed");
    Ok(rig.sequences.into_iter().map(|s| s.output).collect())
}

fn graphs_change_nothing(gguf: &Gguf) -> Result<()> {
    let with = decode(small(gguf, Overlap::Off, true)?)?;
    let without = decode(small(gguf, Overlap::Off, false)?)?;
    ensure!(
        with.iter().all(|output| output.len() > 3),
        "too few outputs"
    );
    ensure!(with == without, "outputs differ");
    Ok(())
}

fn failures_are_alone(gguf: &Gguf) -> Result<()> {
    let run = |broken: bool| -> Result<Rig> {
        let mut rig = Rig::new(small(gguf, Overlap::Off, true)?);
        for i in 0..5 {
            let mut prompt = tokens(i, 30, BROKEN);
            if broken && i == 2 {
                prompt[10] = BROKEN;
            }
            rig.add(prompt, sampling(i), 64);
        }
        rig.prefill(256)?;
        for _ in 0..8 {
            rig.decode(&[0, 1, 2, 3, 4])?;
            let (_, done) = rig.wait()?;
            for (i, output) in done.outputs.iter().enumerate() {
                ensure!(output.failed == (broken && i == 2), "row {i}: {output:?}");
            }
        }
        Ok(rig)
    };
    let (broken, sound) = (run(true)?, run(false)?);
    for (i, (a, b)) in broken.sequences.iter().zip(&sound.sequences).enumerate() {
        ensure!(a.failed == (i == 2), "row {i}");
        ensure!(
            i == 2 || a.output == b.output,
            "row {i} is another one's victim"
        );
    }
    Ok(())
}

/// Some sequences decode while the prompts of others are computed beside them.
fn lanes_change_nothing(gguf: &Gguf, overlap: Overlap) -> Result<()> {
    let run = |overlap| -> Result<Outputs> {
        let mut rig = Rig::new(small(gguf, overlap, true)?);
        for i in 0..6 {
            rig.add(tokens(i, 20 + i, BROKEN), sampling(i), 160);
        }
        rig.prefill(256)?;
        for i in 6..12 {
            rig.add(tokens(i, 200, BROKEN), sampling(i), 240);
        }
        let lane = match overlap {
            Overlap::Off => Lane::Main,
            _ => Lane::Prefill,
        };
        for round in 0..30 {
            while rig.in_flight(Lane::Main) == 2 || rig.in_flight(lane) == 2 {
                rig.wait()?;
            }
            rig.decode(&[0, 1, 2, 3, 4, 5])?;
            let long = 6 + round / 5;
            if rig.in_flight(lane) < 2 && rig.sequences[long].len < 200 {
                let rows = vec![rig.sequences[long].prompt_row(60)];
                rig.submit(lane, vec![long], rows)?;
            }
        }
        while rig.in_flight(Lane::Main) + rig.in_flight(Lane::Prefill) > 0 {
            rig.wait()?;
        }
        rig.prefill(256)?;
        for _ in 0..5 {
            rig.decode(&[0, 3, 6, 7, 8, 9, 10, 11])?;
            rig.wait()?;
        }
        ensure!(rig.sequences.iter().all(|s| !s.failed), "a row failed");
        Ok(rig.sequences.into_iter().map(|s| s.output).collect())
    };
    ensure!(run(overlap)? == run(Overlap::Off)?, "outputs differ");
    Ok(())
}
