use half::bf16;
use spate_types::SamplingParams;

use super::lab::{Lab, Output, Report};
use crate::CudaError;
use crate::driver::Slice;
use crate::kernels::{
    Chosen, MAX_EDITS, MAX_TOP, NONE, Sample, SampleTile, SlotMemory, SlotParams, Top, Want,
    counts_stride,
};

/// Float32 weights are this far from exact ones; a choice that hangs on less may go either way.
const TOLERANCE: f64 = 3e-6;

pub(super) fn check_rows(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let kernel = Sample::load(lab.device())?;
    let mut errors = Vec::new();
    for _ in 0..12 {
        lab.clear()?;
        let (width, tokens) = (8 * (1 + lab.below(600)), 1 + lab.below(200));
        let mut x = lab.bf16s(tokens * width);
        let last: Vec<i32> = (0..16).map(|_| lab.below(3) as i32 - 1).collect();
        for _ in 0..lab.below(20) {
            let at = lab.below(x.len());
            x[at] = lab.pick(&[bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY, bf16::MAX]);
        }
        let rows: Vec<[u32; 2]> = (0..tokens)
            .step_by(1 + lab.below(4))
            .map(|t| [t as u32, lab.pick(&[NONE, t as u32 % 16])])
            .collect();
        let failed: Output<u32> = lab.output(rows.len())?;
        let (on_x, on_last) = (lab.upload(&x)?, lab.upload(&last)?);
        let on_rows = lab.upload(&rows.concat())?;
        // SAFETY: rows and slots are in range; the arena is alive.
        unsafe { kernel.check(&lab.stream, on_x, width, on_rows, on_last, failed.slice)? };
        let want = rows.iter().map(|&[token, slot]| {
            let row = &x[token as usize * width..][..width];
            let lost = slot != NONE && last[slot as usize] < 0;
            u32::from(lost || !row.iter().all(|x| x.is_finite()))
        });
        let same = lab.read(failed)?.into_iter().eq(want);
        errors.push(f64::from(u8::from(!same)));
    }
    Ok(vec![lab.report("check_rows", &errors, 0.0)])
}

pub(super) fn small(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    sample(lab, "small", &[(3, 10), (1000, 30)])
}

/// What the sanitizer, which runs a thousand times slower, gets through.
pub(super) fn smallest(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    sample(lab, "smallest", &[(600, 1)])
}

pub(super) fn large(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    sample(lab, "large", &[(1000, 10), (32_001, 10), (151_936, 3)])
}

/// `sizes`: of the vocabulary, and how many cases of it.
fn sample(lab: &mut Lab, name: &str, sizes: &[(usize, usize)]) -> Result<Vec<Report>, CudaError> {
    let kernel = Sample::load(lab.device())?;
    let (mut choices, mut logprobs) = (Vec::new(), Vec::new());
    for &(vocab, cases) in sizes {
        for _ in 0..cases {
            lab.clear()?;
            let mut case = Case::new(lab, vocab)?;
            for _ in 0..3 {
                case.step(lab, &kernel, &mut choices, &mut logprobs)?;
            }
        }
    }
    Ok(vec![
        lab.report(&format!("sample {name}: choices"), &choices, 0.0),
        lab.report(&format!("sample {name}: logprobs"), &logprobs, 2e-5),
    ])
}

/// Slots with random parameters, on the device and here.
struct Case {
    vocab: usize,
    stride: usize,
    slots: Vec<Slot>,
    memory: SlotMemory,
    last: Output<i32>,
}

struct Slot {
    params: SamplingParams,
    seed: u64,
    /// 0 for tokens never seen, else 1 + how often the token was sampled.
    counts: Vec<u32>,
    generated: u32,
    /// What the device must remember.
    last: i32,
}

impl Case {
    fn new(lab: &mut Lab, vocab: usize) -> Result<Self, CudaError> {
        let kernel = Sample::load(lab.device())?;
        let n = 1 + lab.below(if vocab > 10_000 { 12 } else { 40 });
        let (mut slots, mut on_params, mut on_edits) = (Vec::new(), Vec::new(), Vec::new());
        let (mut prompts, mut bound) = (Vec::new(), Vec::new());
        for i in 0..n {
            let (params, seed) = (random_params(lab, vocab), lab.random());
            let (slot, mut edits) = SlotParams::new(&params, seed)?;
            edits.resize(MAX_EDITS, Default::default());
            on_params.push(slot);
            on_edits.extend(edits);
            let prompt: Vec<u32> = (0..lab.below(50))
                .map(|_| lab.below(vocab) as u32)
                .collect();
            bound.extend([i as u32, prompts.len() as u32, prompt.len() as u32]);
            prompts.extend(&prompt);
            let mut counts = vec![0; vocab];
            prompt.iter().for_each(|&t| counts[t as usize] = 1);
            slots.push(Slot {
                params,
                seed,
                counts,
                generated: 0,
                last: -1,
            });
        }
        let last = lab.output(n)?;
        let memory = SlotMemory {
            params: lab.upload(&on_params)?,
            edits: lab.upload(&on_edits)?,
            counts: lab.output(n * counts_stride(vocab))?.slice,
            generated: lab.output(n)?.slice,
            last: last.slice,
        };
        let (bound, prompts) = (lab.upload(&bound)?, lab.upload(&prompts)?);
        // SAFETY: slots, ranges and tokens are in range; the arena is alive.
        unsafe { kernel.bind(&lab.stream, bound, prompts, vocab, &memory)? };
        Ok(Self {
            vocab,
            stride: vocab.next_multiple_of(4) + 4 * lab.below(3),
            slots,
            memory,
            last,
        })
    }

    /// One step of all slots, with random logits.
    fn step(
        &mut self,
        lab: &mut Lab,
        kernel: &Sample,
        choices: &mut Vec<f64>,
        logprobs: &mut Vec<f64>,
    ) -> Result<(), CudaError> {
        let (n, vocab, stride) = (self.slots.len(), self.vocab, self.stride);
        let mut logits = vec![f32::NAN; n * stride];
        for row in logits.chunks_exact_mut(stride) {
            random_logits(lab, &mut row[..vocab]);
        }
        let words = vocab.div_ceil(32);
        let masks: Vec<u32> = (0..n * words)
            .map(|_| lab.random() as u32 | lab.random() as u32)
            .collect();
        let mut wants: Vec<Want> = (0..n)
            .map(|i| Want {
                slot: i as u32,
                row: i as u32,
                position: lab.below(1 << 20) as u32,
                target: lab.pick(&[NONE, (i * 7 % vocab) as u32]),
                sample: u32::from(lab.below(5) > 0),
                mask: lab.pick(&[NONE, NONE, (n - 1 - i) as u32]),
            })
            .collect();
        let mut failed = vec![0u32; n];
        match lab.below(4) {
            0 => logits[lab.below(n) * stride + lab.below(vocab)] = f32::NAN,
            1 => failed[lab.below(n)] = 1,
            2 => wants[lab.below(n)].slot = NONE,
            _ => {}
        }
        let on_logits = lab.output(logits.len())?;
        lab.write(&logits, on_logits.slice)?;
        let (chosen, tops) = (lab.output(2 * n)?, lab.output(2 * n * MAX_TOP)?);
        let tile = SampleTile {
            logits: on_logits.slice,
            stride,
            vocab,
            wants: lab.upload(&wants)?,
            masks: lab.upload(&masks)?,
            failed: lab.upload(&failed)?,
            chosen: chosen.slice,
            tops: tops.slice,
        };
        // SAFETY: slots, rows and tokens are in range; the arena is alive.
        unsafe { kernel.sample(&lab.stream, &tile, &self.memory)? };
        let (chosen, tops) = (lab.read(chosen)?, lab.read(tops)?);
        let failed_after: Vec<u32> = lab.download(tile.failed)?;
        let same = lab.read(on_logits)?.into_iter().map(|x| x.to_bits());
        let restored = same.eq(logits.iter().map(|x| x.to_bits()));

        for (i, want) in wants.iter().enumerate() {
            let row = &logits[i * stride..][..vocab];
            let [prompt, sampled] = [i, n + i].map(|at| Outcome {
                chosen: chosen[at],
                tops: &tops[at * MAX_TOP..][..MAX_TOP],
            });
            let must_fail = failed[i] == 1 || !row.iter().all(|x| x.is_finite());
            if want.slot == NONE || must_fail {
                let silent = prompt.chosen.token == -1 && sampled.chosen.token == -1;
                let marked = want.slot == NONE || failed_after[i] == 1;
                if want.slot != NONE && want.sample == 1 {
                    self.slots[i].last = -1;
                }
                choices.push(wrong(!silent || !marked));
                continue;
            }
            let slot = &mut self.slots[i];
            if want.target != NONE {
                let k = slot.params.prompt_logprobs.unwrap_or(0);
                logprobs.push(logprob_error(row, want.target, k, &prompt));
            }
            if want.sample == 0 {
                choices.push(wrong(sampled.chosen.token != -1));
                continue;
            }
            let mask = wants[i].mask;
            let mask = (mask != NONE).then(|| &masks[mask as usize * words..][..words]);
            let modified = slot.modify(row, mask);
            let token = sampled.chosen.token;
            let right = (0..vocab as i32).contains(&token)
                && slot.might_choose(&modified, token as usize, want.position);
            choices.push(wrong(!right || !restored));
            if let Some(k) = slot.params.logprobs.filter(|_| right) {
                logprobs.push(logprob_error(row, token as u32, k, &sampled));
            }
            if right {
                slot.counts[token as usize] = slot.counts[token as usize].max(1) + 1;
            }
            slot.generated += 1;
            slot.last = token;
        }
        let last = lab.read(self.last)?;
        let remembered = self.slots.iter().map(|s| s.last).eq(last);
        choices.push(wrong(!remembered));
        Ok(())
    }
}

fn wrong(wrong: bool) -> f64 {
    f64::from(u8::from(wrong))
}

/// What the device says about a position.
struct Outcome<'a> {
    chosen: Chosen,
    tops: &'a [Top],
}

fn random_params(lab: &mut Lab, vocab: usize) -> SamplingParams {
    let mut biases: Vec<(u32, f32)> = (0..lab.below(4))
        .map(|i| {
            let bias = lab.pick(&[-100.0, 5.0, 20.0, 0.5]);
            ((lab.below(vocab) / 4 * 4 + i) as u32, bias)
        })
        .filter(|&(token, _)| (token as usize) < vocab)
        .collect();
    biases.sort_by_key(|b| b.0);
    biases.dedup_by_key(|b| b.0);
    let penalties = lab.below(3) == 0;
    SamplingParams {
        temperature: lab.pick(&[0.0, 0.0, 0.3, 0.8, 1.0, 2.5]),
        top_k: lab.pick(&[0, 0, 1, 5, 40, 900, 100_000]),
        top_p: lab.pick(&[1.0, 1.0, 0.1, 0.8, 0.95, 0.9999]),
        min_p: lab.pick(&[0.0, 0.0, 0.05, 0.5]),
        repetition_penalty: if penalties { 1.3 } else { 1.0 },
        presence_penalty: if penalties { 0.7 } else { 0.0 },
        frequency_penalty: if penalties { -0.4 } else { 0.0 },
        logit_bias: biases,
        logprobs: lab.pick(&[None, Some(0), Some(5), Some(20)]),
        prompt_logprobs: lab.pick(&[None, Some(1), Some(20)]),
        min_tokens_banned: (0..lab.pick(&[0, 1, 2, 1500]))
            .map(|_| lab.below(vocab) as u32)
            .collect(),
        min_tokens: lab.below(3) as u32,
        ..SamplingParams::default()
    }
}

/// Flat, peaked, or with many equal values.
fn random_logits(lab: &mut Lab, row: &mut [f32]) {
    let (spread, step) = (lab.pick(&[0.2, 2.0, 6.0]), lab.pick(&[0.0, 0.0, 0.5, 4.0]));
    for logit in row.iter_mut() {
        let x = lab.normal() * spread;
        *logit = if step > 0.0 {
            (x / step).round() * step
        } else {
            x
        } as f32;
    }
}

impl Slot {
    fn modify(&self, logits: &[f32], mask: Option<&[u32]>) -> Vec<f32> {
        let p = &self.params;
        let mut logits = logits.to_vec();
        for &(token, bias) in &p.logit_bias {
            logits[token as usize] += bias;
        }
        if self.generated < p.min_tokens {
            for &token in &p.min_tokens_banned {
                logits[token as usize] = f32::NEG_INFINITY;
            }
        }
        for (token, logit) in logits.iter_mut().enumerate() {
            if p.has_penalties() && self.counts[token] > 0 {
                let sampled = self.counts[token] - 1;
                *logit = match *logit > 0.0 {
                    true => *logit / p.repetition_penalty,
                    false => *logit * p.repetition_penalty,
                };
                *logit -= if sampled > 0 { p.presence_penalty } else { 0.0 };
                *logit -= p.frequency_penalty * sampled as f32;
            }
            if mask.is_some_and(|m| m[token / 32] >> (token % 32) & 1 == 0) {
                *logit = f32::NEG_INFINITY;
            }
        }
        logits
    }

    /// Whether `token` is what the parameters and the random number give, up to rounding.
    fn might_choose(&self, logits: &[f32], token: usize, position: u32) -> bool {
        let p = &self.params;
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if p.temperature == 0.0 || max == f32::NEG_INFINITY {
            return logits.iter().position(|&l| l == max) == Some(token);
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| descending(logits, a, b));
        let weight = |t: usize| (f64::from(logits[t] - max) / f64::from(p.temperature)).exp();
        let weights: Vec<f64> = (0..logits.len()).map(weight).collect();
        if p.top_k > 0 {
            order.truncate(p.top_k as usize);
        }
        let total: f64 = order.iter().map(|&t| weights[t]).sum();
        let u = uniform(self.seed, position);
        let shades = [1.0 - TOLERANCE, 1.0, 1.0 + TOLERANCE];
        shades.iter().any(|shade_p| {
            shades.iter().any(|shade_min| {
                let mass = if p.top_p < 1.0 {
                    total * f64::from(p.top_p) * shade_p
                } else {
                    f64::MAX
                };
                let mut sum = 0.0;
                let mut kept: Vec<usize> = Vec::new();
                for (i, &t) in order.iter().enumerate() {
                    if i > 0 && (sum >= mass || weights[t] < f64::from(p.min_p) * shade_min) {
                        break;
                    }
                    sum += weights[t];
                    kept.push(t);
                }
                if !kept.contains(&token) {
                    return false;
                }
                let before: f64 = kept
                    .iter()
                    .filter(|&&t| t < token)
                    .map(|&t| weights[t])
                    .sum();
                let slack = TOLERANCE * sum;
                (before - slack..=before + weights[token] + slack).contains(&(u * sum))
            })
        })
    }
}

/// The lower id first among equals, as which +0 and -0 count.
fn descending(logits: &[f32], a: usize, b: usize) -> std::cmp::Ordering {
    let by_logit = (logits[b] + 0.0).total_cmp(&(logits[a] + 0.0));
    by_logit.then(a.cmp(&b))
}

/// Largest difference of a logprob; infinite if a rank or an alternative is wrong.
fn logprob_error(logits: &[f32], token: u32, k: u32, got: &Outcome<'_>) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| descending(logits, a, b));
    let rank = order.iter().position(|&t| t == token as usize);
    let Some(got_all) = got.chosen.logprobs(got.tops) else {
        return f64::INFINITY;
    };
    let want_tops = &order[..order.len().min(k as usize)];
    let tops = got_all.top.iter().map(|t| t.0 as usize);
    if got_all.token != token
        || rank != Some(got_all.rank as usize - 1)
        || !tops.eq(want_tops.iter().copied())
    {
        return f64::INFINITY;
    }
    let mut all = got_all.top;
    all.push((token, got_all.logprob));
    let errors = all.iter().map(|&(t, logprob)| {
        (f64::from(logprob) - (f64::from(logits[t as usize]) - log_sum)).abs()
    });
    errors.fold(0.0, f64::max)
}

/// Philox4x32-10 as published (Salmon et al. 2011): a uniform number in [0, 1).
fn uniform(seed: u64, position: u32) -> f64 {
    let (mut k, mut c) = ([seed as u32, (seed >> 32) as u32], [position, 0, 0, 0]);
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xd251_1f53;
        let b = u64::from(c[2]) * 0xcd9e_8d57;
        c = [
            (b >> 32) as u32 ^ c[1] ^ k[0],
            b as u32,
            (a >> 32) as u32 ^ c[3] ^ k[1],
            a as u32,
        ];
        k = [
            k[0].wrapping_add(0x9e37_79b9),
            k[1].wrapping_add(0xbb67_ae85),
        ];
    }
    let bits = (u64::from(c[1]) << 32 | u64::from(c[0])) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

pub(super) fn speed(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let kernel = &Sample::load(lab.device())?;
    let greedy = SamplingParams::default();
    let drawn = SamplingParams {
        temperature: 0.8,
        ..SamplingParams::default()
    };
    let top_p = SamplingParams {
        top_p: 0.95,
        ..drawn.clone()
    };
    let top_k = SamplingParams {
        top_k: 40,
        ..top_p.clone()
    };
    let penalties = SamplingParams {
        presence_penalty: 0.5,
        ..drawn.clone()
    };
    let logprobs = SamplingParams {
        logprobs: Some(5),
        ..greedy.clone()
    };
    let mut reports = Vec::new();
    // Of likely tokens a language model mostly sees some dozens.
    for (name, params, likely) in [
        ("greedy", &greedy, 50),
        ("all", &drawn, 50),
        ("top-p", &top_p, 50),
        ("top-p of a flat row", &top_p, 0),
        ("top-k, top-p", &top_k, 50),
        ("top-k, top-p of a flat row", &top_k, 0),
        ("penalties", &penalties, 50),
        ("greedy, logprobs", &logprobs, 50),
    ] {
        for n in [1, 256] {
            let time = time_one(lab, kernel, params, likely, n)?;
            let mut report = lab.report(&format!("sample {name} {n} x 128256"), &[], 0.0);
            report.time = Some(time);
            reports.push(report);
        }
    }
    Ok(reports)
}

fn time_one(
    lab: &mut Lab,
    kernel: &Sample,
    params: &SamplingParams,
    likely: usize,
    n: usize,
) -> Result<std::time::Duration, CudaError> {
    const VOCAB: usize = 128_256;
    lab.clear()?;
    let (slot, mut edits) = SlotParams::new(params, 7)?;
    edits.resize(MAX_EDITS, Default::default());
    let mut row: Vec<f32> = (0..VOCAB).map(|_| 2.0 * lab.normal() as f32).collect();
    for i in 0..likely {
        row[i * 777] = 20.0 - i as f32 * 0.2;
    }
    // A conversation of a few hundred different tokens.
    let counts: Vec<u16> = (0..VOCAB).map(|i| u16::from(i % 300 == 0)).collect();
    let wants: Vec<Want> = (0..n as u32)
        .map(|i| Want {
            slot: i,
            row: i,
            position: i,
            target: NONE,
            sample: 1,
            mask: NONE,
        })
        .collect();
    let memory = SlotMemory {
        params: lab.upload(&vec![slot; n])?,
        edits: lab.upload(&edits.repeat(n))?,
        counts: lab.upload(&counts.repeat(n))?,
        generated: lab.upload(&vec![0; n])?,
        last: lab.upload(&vec![0; n])?,
    };
    let tile = SampleTile {
        logits: lab.upload(&row.repeat(n))?,
        stride: VOCAB,
        vocab: VOCAB,
        wants: lab.upload(&wants)?,
        masks: Slice::null(),
        failed: lab.upload(&vec![0; n])?,
        chosen: lab.output(2 * n)?.slice,
        tops: lab.output(2 * n * MAX_TOP)?.slice,
    };
    // SAFETY: slots, rows and tokens are in range; the arena is alive.
    lab.time(|stream| unsafe { kernel.sample(stream, &tile, &memory) })
}
