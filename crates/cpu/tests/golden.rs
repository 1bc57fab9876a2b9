//! Real models against outputs of another engine in float32 (see `tests/golden`).
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::OnceLock;

use common::{RealModel, Runner, Sequence, real, real_with_kv};
use serde_json::Value;
use spate_cpu::{CpuMode, KvDtype};
use spate_types::{SamplingParams, TokenId};

/// Where the oracle's own two best tokens are this close, another choice is no error.
const TIE: f64 = 1e-3;

/// Greedy tokens that `exact` must share with the oracle, which stops earlier at an end of sequence.
const GREEDY: usize = 32;

struct Case {
    name: String,
    prompt: Vec<TokenId>,
    /// From the second token on.
    prompt_logprobs: Vec<f64>,
    greedy: Vec<Value>,
}

fn cases(golden: &str) -> Vec<Case> {
    let golden: Value = serde_json::from_str(golden).unwrap();
    let cases = golden["cases"].as_array().unwrap().iter();
    cases
        .map(|case| Case {
            name: case["name"].as_str().unwrap().to_owned(),
            prompt: ids(&case["prompt_tokens"]),
            prompt_logprobs: case["prompt_logprobs"].as_array().unwrap()[1..]
                .iter()
                .map(|v| v.as_f64().unwrap())
                .collect(),
            greedy: case["greedy"].as_array().unwrap().clone(),
        })
        .collect()
}

fn ids(value: &Value) -> Vec<TokenId> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|v| v.as_u64().unwrap() as TokenId).collect()
}

/// Prompt logprobs with the best token at each position, and up to `output` greedy tokens: prompts
/// one by one, then all decodes together.
fn run(runner: &mut Runner, cases: &[Case], output: usize) -> Vec<Sequence> {
    let mut runs: Vec<Sequence> = Vec::new();
    for (slot, case) in cases.iter().enumerate() {
        let sampling = SamplingParams {
            prompt_logprobs: Some(1),
            ..SamplingParams::default()
        };
        let room = case.prompt.len() + output;
        let mut run = runner.sequence(slot as u32, &case.prompt, sampling, room);
        while run.output.is_empty() {
            runner.step(&mut [&mut run], 512);
        }
        assert_eq!(run.prompt_logprobs.len(), case.prompt_logprobs.len());
        runs.push(run);
    }
    for _ in 1..output {
        runner.step(&mut runs.iter_mut().collect::<Vec<_>>(), 512);
    }
    assert!(runs.iter().all(|run| !run.failed));
    runs
}

/// Sum of |Δ logprob| over the prompt's positions.
fn deviation(case: &Case, run: &Sequence) -> f64 {
    let pairs = run.prompt_logprobs.iter().zip(&case.prompt_logprobs);
    pairs
        .map(|(got, want)| (f64::from(got.logprob) - want).abs())
        .sum()
}

/// Output tokens that equal the oracle's, up to a near-tie of the oracle.
fn greedy_prefix(case: &Case, output: &[TokenId]) -> (usize, bool) {
    for (i, (step, &token)) in case.greedy.iter().zip(output).enumerate() {
        if step["token"].as_u64() != Some(token.into()) {
            let logprob = |rank: usize| step["top"][rank][1].as_f64().unwrap();
            return (i, logprob(0) - logprob(1) < TIE);
        }
    }
    (case.greedy.len().min(output.len()), true)
}

/// A model with another engine's outputs, and what it gives in exact mode: several tests need that.
struct Golden {
    model: &'static RealModel,
    outputs: &'static str,
    exact: OnceLock<Option<Vec<Sequence>>>,
}

impl Golden {
    const fn new(model: &'static RealModel, outputs: &'static str) -> Self {
        Self {
            model,
            outputs,
            exact: OnceLock::new(),
        }
    }

    /// `None` if the model isn't there.
    fn exact(&self) -> Option<&[Sequence]> {
        let run = || {
            let mut runner = real(self.model, CpuMode::Exact)?;
            Some(run(&mut runner, &cases(self.outputs), GREEDY))
        };
        self.exact.get_or_init(run).as_deref()
    }
}

static SMOLLM2: Golden = Golden::new(
    &common::SMOLLM2,
    include_str!("../../../tests/golden/SmolLM2-135M-Instruct.Q4_1.json"),
);
static QWEN: Golden = Golden::new(
    &common::QWEN,
    include_str!("../../../tests/golden/qwen-0.5b.json"),
);
static GEMMA: Golden = Golden::new(
    &common::GEMMA,
    include_str!("../../../tests/golden/gemma3-270m-q4_k_m.json"),
);

#[test]
fn smollm2_agrees_with_the_oracle() {
    exact_and_fast_agree_with_the_oracle(&SMOLLM2);
}

#[test]
fn qwen_agrees_with_the_oracle() {
    exact_and_fast_agree_with_the_oracle(&QWEN);
}

#[test]
fn gemma_agrees_with_the_oracle() {
    exact_and_fast_agree_with_the_oracle(&GEMMA);
}

fn exact_and_fast_agree_with_the_oracle(golden: &Golden) {
    let cases = cases(golden.outputs);
    let Some(exact_runs) = golden.exact() else {
        return;
    };
    let fast_runs = run(&mut real(golden.model, CpuMode::Fast).unwrap(), &cases, 1);
    let (mut positions, mut exact_sum, mut fast_sum, mut same_best) = (0, 0.0, 0.0, 0);
    for ((case, a), b) in cases.iter().zip(exact_runs).zip(&fast_runs) {
        let (same, excused) = greedy_prefix(case, &a.output);
        assert!(
            same >= GREEDY.min(case.greedy.len()) || excused,
            "{}: exact differs from the oracle at output token {same}",
            case.name
        );
        positions += case.prompt_logprobs.len();
        exact_sum += deviation(case, a);
        fast_sum += deviation(case, b);
        let best = a.prompt_logprobs.iter().zip(&b.prompt_logprobs);
        same_best += best.filter(|(a, b)| a.top[0].0 == b.top[0].0).count();
        println!(
            "{:15} {:4} prompt tokens: mean |Δ logprob| exact {:.6}, fast {:.6}; {same} greedy tokens",
            case.name,
            case.prompt.len(),
            deviation(case, a) / case.prompt_logprobs.len().max(1) as f64,
            deviation(case, b) / case.prompt_logprobs.len().max(1) as f64,
        );
    }
    let positions = positions as f64;
    let (exact, fast) = (exact_sum / positions, fast_sum / positions);
    let agreement = same_best as f64 / positions;
    println!(
        "all: exact {exact:.6}, fast {fast:.6}, top-1 agreement {:.2} %",
        agreement * 100.0
    );
    assert!(exact <= 2e-3, "exact: mean |Δ prompt logprob| {exact}");
    assert!(fast <= 0.05, "fast: mean |Δ prompt logprob| {fast}");
    assert!(agreement >= 0.97, "fast: top-1 agreement {agreement}");
}

#[test]
fn a_narrow_kv_cache_costs_smollm2_little() {
    let limits = [
        (KvDtype::F16, 1e-3),
        (KvDtype::Bf16, 0.01),
        (KvDtype::Int8, 0.02),
    ];
    a_narrow_kv_cache_costs_little(&SMOLLM2, &limits);
}

#[test]
fn an_int8_kv_cache_costs_qwen_little() {
    a_narrow_kv_cache_costs_little(&QWEN, &[(KvDtype::Int8, 0.02)]);
}

#[test]
fn an_int8_kv_cache_costs_gemma_little() {
    a_narrow_kv_cache_costs_little(&GEMMA, &[(KvDtype::Int8, 0.02)]);
}

/// In exact mode, where nothing else is rounded to a few bits; against a cache of float32.
fn a_narrow_kv_cache_costs_little(golden: &Golden, limits: &[(KvDtype, f64)]) {
    let cases = cases(golden.outputs);
    let logprobs = |runs: &[Sequence]| -> Vec<f64> {
        let all = runs.iter().flat_map(|run| &run.prompt_logprobs);
        all.map(|l| f64::from(l.logprob)).collect()
    };
    let Some(want) = golden.exact().map(logprobs) else {
        return;
    };
    for &(dtype, limit) in limits {
        let mut runner = real_with_kv(golden.model, CpuMode::Exact, Some(dtype)).unwrap();
        let got = logprobs(&run(&mut runner, &cases, 1));
        let sum: f64 = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).sum();
        let mean = sum / want.len() as f64;
        println!("{dtype:?}: mean |Δ logprob| {mean:.6}");
        assert!(mean > 0.0 && mean <= limit, "{dtype:?}: {mean}");
    }
}
