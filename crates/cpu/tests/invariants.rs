//! A sequence's tokens and logprobs, bit for bit, whatever surrounds it.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Runner, SMOLLM2, Sequence, busy_sampling, real, tiny};
use spate_cpu::CpuMode;
use spate_executor::{Batch, BlockCopy, Executor, Input};
use spate_model::GgmlType;
use spate_model::testing::TinyLlama;
use spate_types::{SamplingParams, TokenId};

const MODES: [CpuMode; 2] = [CpuMode::Exact, CpuMode::Fast];

/// Prompts of lengths around block and chunk borders.
fn prompts(vocab: u32, lengths: &[usize]) -> Vec<Vec<TokenId>> {
    let prompt = |(i, &len): (usize, &usize)| {
        let token = |j: usize| ((j * j * 31 + i * 97 + j * 7) as u32) % vocab;
        (0..len).map(token).collect()
    };
    lengths.iter().enumerate().map(prompt).collect()
}

/// Token, bits of its logprob, rank, alternatives.
type Traced = (TokenId, u32, u32, Vec<(TokenId, u32)>);

/// Everything that a sequence gave, as bits.
fn trace(s: &Sequence) -> Vec<Traced> {
    assert!(!s.failed);
    let logprobs = s.prompt_logprobs.iter().chain(&s.sampled_logprobs);
    let trace: Vec<_> = logprobs
        .map(|l| {
            let top = l.top.iter().map(|t| (t.0, t.1.to_bits())).collect();
            (l.token, l.logprob.to_bits(), l.rank, top)
        })
        .collect();
    assert_eq!(trace.len(), s.prompt.len() - 1 + s.output.len());
    trace
}

/// Alone and whole, then in chunks, then all together in one batch with chunks of their own.
fn check(runner: &mut Runner, lengths: &[usize], output: usize) {
    let vocab = runner.exec.capacity().vocab_size;
    let prompts = prompts(vocab, lengths);
    let sampling = |i: usize| busy_sampling(i as u64);
    let mut alone = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let whole = runner.generate(prompt, sampling(i), output, 512);
        for chunk in [7, 16, 33] {
            let cut = runner.generate(prompt, sampling(i), output, chunk);
            assert_eq!(
                trace(&cut),
                trace(&whole),
                "prompt {i} in chunks of {chunk}"
            );
        }
        alone.push(whole);
    }
    let mut together: Vec<Sequence> = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let room = prompt.len() + output;
        together.push(runner.sequence(i as u32, prompt, sampling(i), room));
    }
    while together.iter().any(|s| s.output.len() < output) {
        let live = together.iter_mut().filter(|s| s.output.len() < output);
        runner.step(&mut live.collect::<Vec<_>>(), 19);
    }
    for (i, (a, b)) in alone.iter().zip(&together).enumerate() {
        assert_eq!(a.output, b.output, "prompt {i}");
        assert_eq!(trace(a), trace(b), "prompt {i}, batched");
    }
    together.iter().for_each(|s| runner.end(s));
}

#[test]
fn alone_chunked_and_batched_are_equal() {
    let specs = [
        TinyLlama::default(),
        TinyLlama {
            // More queries per key head than a register block, a wide head, float weights.
            heads: 5,
            kv_heads: 1,
            head_dim: 48,
            weights: GgmlType::F16,
            value_weights: GgmlType::F32,
            bias: true,
            rope_factors: true,
            tied: true,
            ..TinyLlama::default()
        },
        TinyLlama {
            // Local and global layers; a window that ends within a tile.
            architecture: "gemma3",
            layers: 4,
            window: Some(37),
            ..TinyLlama::default()
        },
        TinyLlama {
            architecture: "phi3",
            window: Some(16),
            ..TinyLlama::default()
        },
    ];
    for mode in MODES {
        for spec in &specs {
            let mut runner = tiny(mode, spec);
            let local = runner.exec.capacity().local.map(|local| local.window);
            assert_eq!(local, spec.window);
            check(&mut runner, &[1, 2, 15, 16, 17, 33, 70, 130], 12);
        }
    }
}

#[test]
fn alone_chunked_and_batched_are_equal_on_the_real_model() {
    for mode in MODES {
        if let Some(mut runner) = real(&SMOLLM2, mode) {
            check(&mut runner, &[5, 16, 41], 3);
        }
    }
}

#[test]
fn a_copied_or_shared_prefix_gives_the_same_as_a_computed_one() {
    for mode in MODES {
        let mut runner = tiny(mode, &TinyLlama::default());
        let prompt = &prompts(259, &[40])[0];
        let mut cold = runner.sequence(0, prompt, busy_sampling(5), 60);
        // The sequences that follow start behind its prefix: their prompt logprobs start there too.
        while cold.output.len() < 12 {
            runner.step(&mut [&mut cold], 512);
        }
        let tail = |s: &Sequence| trace_from(s, 32);

        // The first two blocks are shared, the third is its own.
        let mut shared = runner.sequence(1, prompt, busy_sampling(5), 60);
        let own = shared.blocks.clone();
        shared.blocks = Arc::new([&cold.blocks[..2], &own[2..]].concat());
        shared.done = 32;
        finish(&mut runner, &mut shared, Vec::new());
        assert_eq!(tail(&shared), tail(&cold));

        // All three are copies; the third is overwritten from position 33 on.
        let mut copied = runner.sequence(2, prompt, busy_sampling(5), 60);
        copied.done = 33;
        let pairs = cold.blocks.iter().zip(copied.blocks.iter()).take(3);
        let copies: Vec<BlockCopy> = pairs.map(|(&src, &dst)| BlockCopy { src, dst }).collect();
        finish(&mut runner, &mut copied, copies);
        assert_eq!(trace_from(&copied, 33), trace_from(&cold, 33));
    }
}

fn trace_from(s: &Sequence, start: usize) -> Vec<(TokenId, u32)> {
    let skip = s.prompt_logprobs.len() - (s.prompt.len() - 1 - start);
    let prompt = s.prompt_logprobs[skip..].iter();
    let bits = prompt.chain(&s.sampled_logprobs);
    bits.map(|l| (l.token, l.logprob.to_bits())).collect()
}

/// Runs a sequence that starts behind position 0: it must be bound all the same.
fn finish(runner: &mut Runner, s: &mut Sequence, copies: Vec<BlockCopy>) {
    let mut row = s.next_row(512);
    row.bind = Some(s.bind());
    let rows = vec![row];
    let output = runner.run(Batch {
        copies,
        rows,
        ..Batch::default()
    });
    s.take(output.into_iter().next().unwrap(), 512);
    while s.output.len() < 12 {
        runner.step(&mut [&mut *s], 512);
    }
}

#[test]
fn a_preempted_sequence_goes_on_as_if_nothing_had_happened() {
    for mode in MODES {
        let mut runner = tiny(mode, &TinyLlama::default());
        let prompt = &prompts(259, &[21])[0];
        let undisturbed = runner.generate(prompt, busy_sampling(9), 14, 512);

        let mut s = runner.sequence(0, prompt, busy_sampling(9), 40);
        while s.output.len() < 6 {
            runner.step(&mut [&mut s], 8);
        }
        // Its blocks are lost. All but the last output token are computed again, in other blocks,
        // without a bind: the slot keeps its counts and its random stream.
        let again = runner.sequence(0, prompt, busy_sampling(9), 40);
        s.blocks = again.blocks;
        let mut row = s.next_row(512);
        row.start = 0;
        row.input = Input::Tokens([&s.prompt[..], &s.output].concat());
        row.sample = true;
        row.prompt_logprobs = false;
        let rows = vec![row];
        let copies = Vec::new();
        let output = runner
            .run(Batch {
                copies,
                rows,
                ..Batch::default()
            })
            .remove(0);
        let end = s.prompt.len() + s.output.len();
        s.take(output, 512);
        s.done = end;
        while s.output.len() < 14 {
            runner.step(&mut [&mut s], 8);
        }
        assert_eq!(s.output, undisturbed.output);
        assert_eq!(trace(&s), trace(&undisturbed));
    }
}

#[test]
fn a_slot_that_is_used_again_remembers_nothing() {
    let mut runner = tiny(CpuMode::Fast, &TinyLlama::default());
    let prompt = &prompts(259, &[20])[0];
    let plain = SamplingParams {
        logprobs: Some(0),
        prompt_logprobs: Some(0),
        ..SamplingParams::default()
    };
    let fresh = runner.generate(prompt, plain.clone(), 8, 512);
    let mut loud = busy_sampling(3);
    loud.logit_bias = fresh.output.iter().map(|&t| (t, -50.0)).collect();
    loud.logit_bias.sort_by_key(|b| b.0);
    loud.logit_bias.dedup_by_key(|b| b.0);
    loud.min_tokens = 100;
    loud.min_tokens_banned = (0..200).collect();
    let other = runner.generate(prompt, loud, 8, 512);
    assert!(other.output.iter().all(|&t| t >= 200));
    assert_eq!(
        trace(&runner.generate(prompt, plain, 8, 512)),
        trace(&fresh)
    );
}

#[test]
fn a_row_that_is_not_finite_fails_alone_and_leaves_no_trace() {
    for mode in MODES {
        let spec = TinyLlama {
            weights: GgmlType::F16,
            nan_token: Some(258),
            ..TinyLlama::default()
        };
        let mut runner = tiny(mode, &spec);
        let good_prompt = &prompts(258, &[30])[0];
        let good = runner.generate(good_prompt, busy_sampling(1), 6, 512);

        let mut bad_prompt = prompts(258, &[40]).remove(0);
        bad_prompt[3] = 258;
        let mut bad = runner.sequence(0, &bad_prompt, busy_sampling(2), 60);
        let mut fine = runner.sequence(1, good_prompt, busy_sampling(1), 60);
        // The chunk with the bad token samples nothing, and yet its blocks must not be shared.
        runner.step(&mut [&mut bad, &mut fine], 16);
        assert!(bad.failed && !fine.failed);
        while fine.output.len() < 6 {
            runner.step(&mut [&mut fine, &mut bad], 16);
        }
        assert!(bad.failed && bad.output.is_empty());
        assert_eq!(trace(&fine), trace(&good));

        // Its slot and its blocks serve the next sequence as if they were new.
        let mut next = runner.sequence(0, good_prompt, busy_sampling(1), 60);
        next.blocks = bad.blocks.clone();
        while next.output.len() < 6 {
            runner.step(&mut [&mut next], 512);
        }
        assert_eq!(trace(&next), trace(&good));
    }
}
