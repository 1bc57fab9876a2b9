//! From logits to a token, in the order that [`SamplingParams`] documents.
//!
//! Biases, bans and penalties touch few logits: they are changed in place and restored afterwards,
//! because logprobs are of the raw distribution. Temperature, top-k, top-p and min-p never touch the
//! logits: each keeps a prefix of the tokens in descending order (the lower id first among equals),
//! and [`top`] finds only as much of that order as is needed.

use std::cmp::Ordering;

use spate_types::{Logprobs, SampledToken, SamplingParams, TokenId};

use crate::linear::{Isa, Kernel, Lanes};
use crate::math::exp;
use crate::philox::uniform;
use crate::slots::SlotState;

#[cfg(test)]
mod tests;

/// How many of the best tokens the search for the end of top-p or min-p begins with; it goes on with
/// eight times as many until the end is among them.
const FIRST_CANDIDATES: usize = 64;

/// Buffers that are reused from token to token.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    candidates: Vec<Candidate>,
    /// Ids and logits as they were before they were changed.
    changed: Vec<(TokenId, f32)>,
}

/// A token and its logit.
type Candidate = (TokenId, f32);

/// Whether all logits are finite.
pub(crate) fn finite(isa: Isa, logits: &[f32]) -> bool {
    let mut finite = false;
    isa.run(Finite {
        logits,
        finite: &mut finite,
    });
    finite
}

/// Chooses the token at `position`, among those that `mask` allows. The logits must be finite; they are the
/// same afterwards.
pub(crate) fn sample(
    isa: Isa,
    logits: &mut [f32],
    slot: &SlotState,
    position: u32,
    mask: Option<&[u32]>,
    scratch: &mut Scratch,
) -> SampledToken {
    let params = &*slot.sampling;
    modify(logits, slot, mask, &mut scratch.changed);
    // Bans may leave nothing of what the mask allows.
    let nothing = mask.is_some() && highest(isa, logits) == f32::NEG_INFINITY;
    let token = if params.temperature == 0.0 || nothing {
        best(isa, logits)
    } else {
        let u = uniform(slot.seed, position);
        draw(isa, logits, params, u, &mut scratch.candidates)
    };
    // Backwards: a token that was changed twice gets its first value back.
    for (id, logit) in scratch.changed.drain(..).rev() {
        logits[id as usize] = logit;
    }
    let logprobs = params
        .logprobs
        .map(|k| Box::new(logprobs(isa, logits, token, k, scratch)));
    SampledToken { token, logprobs }
}

/// Applies biases, bans, penalties and the mask, and notes what was there before.
fn modify(
    logits: &mut [f32],
    slot: &SlotState,
    mask: Option<&[u32]>,
    changed: &mut Vec<(TokenId, f32)>,
) {
    let params = &*slot.sampling;
    let mut change = |id: TokenId, f: &dyn Fn(f32) -> f32| {
        let logit = &mut logits[id as usize];
        changed.push((id, *logit));
        *logit = f(*logit);
    };
    for &(id, bias) in &params.logit_bias {
        change(id, &|logit| logit + bias);
    }
    if slot.generated < params.min_tokens {
        for &id in &params.min_tokens_banned {
            change(id, &|_| f32::NEG_INFINITY);
        }
    }
    for (&id, &count) in slot.counts.iter().flatten() {
        let repetition = params.repetition_penalty;
        let flat = if count > 0 {
            params.presence_penalty
        } else {
            0.0
        };
        let per_count = params.frequency_penalty * count as f32;
        change(id, &|logit| {
            let logit = if logit > 0.0 {
                logit / repetition
            } else {
                logit * repetition
            };
            logit - flat - per_count
        });
    }
    if let Some(mask) = mask {
        let hidden = |id: &TokenId| mask[*id as usize / 32] >> (id % 32) & 1 == 0;
        for id in (0..logits.len() as TokenId).filter(hidden) {
            changed.push((id, logits[id as usize]));
            logits[id as usize] = f32::NEG_INFINITY;
        }
    }
}

/// The highest logit.
fn highest(isa: Isa, logits: &[f32]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    isa.run(Max {
        logits,
        max: &mut max,
    });
    max
}

/// The token with the highest logit, the lowest id among equals.
fn best(isa: Isa, logits: &[f32]) -> TokenId {
    let max = highest(isa, logits);
    let best = logits.iter().position(|&logit| logit == max);
    best.unwrap_or(0) as TokenId
}

/// Draws with `u` from [0, 1) from the tokens that top-k, top-p and min-p leave.
fn draw(
    isa: Isa,
    logits: &[f32],
    params: &SamplingParams,
    u: f64,
    candidates: &mut Vec<Candidate>,
) -> TokenId {
    let softmax = Softmax {
        isa,
        max: highest(isa, logits),
        inv_temperature: 1.0 / params.temperature,
    };
    if params.top_k == 0 && params.top_p >= 1.0 && params.min_p <= 0.0 {
        return softmax.draw_from_all(logits, u);
    }
    let vocab = logits.len();
    let mut count = match params.top_k {
        0 => vocab.min(FIRST_CANDIDATES),
        k => vocab.min(k as usize),
    };
    loop {
        top(logits, count, candidates);
        let all = params.top_k > 0 || count == vocab;
        if let Some(kept) = softmax.keep(logits, candidates, params, all) {
            return softmax.draw_from(&candidates[..kept], u);
        }
        count = vocab.min(count * 8);
    }
}

/// The distribution at a temperature, as weights relative to the most likely token's.
struct Softmax {
    isa: Isa,
    max: f32,
    inv_temperature: f32,
}

impl Softmax {
    fn weight(&self, logit: f32) -> f64 {
        f64::from(exp((logit - self.max) * self.inv_temperature))
    }

    /// The sum of the weights of `logits`.
    fn total(&self, logits: &[f32]) -> f64 {
        let mut total = 0.0;
        self.isa.run(SumExp {
            logits,
            max: self.max,
            scale: self.inv_temperature,
            total: &mut total,
        });
        total
    }

    /// How many of the `candidates`, the best tokens in order, are kept; `None` if the end may lie
    /// behind them. `all`: there are no more than these.
    fn keep(
        &self,
        logits: &[f32],
        candidates: &[Candidate],
        params: &SamplingParams,
        all: bool,
    ) -> Option<usize> {
        let mass = if params.top_p >= 1.0 {
            f64::INFINITY
        } else if params.top_k == 0 {
            self.total(logits) * f64::from(params.top_p)
        } else {
            let kept = candidates.iter().map(|c| self.weight(c.1));
            kept.sum::<f64>() * f64::from(params.top_p)
        };
        let min = f64::from(params.min_p);
        let mut sum = 0.0;
        for (i, &(_, logit)) in candidates.iter().enumerate() {
            let weight = self.weight(logit);
            // The most likely token always stays.
            if i > 0 && (sum >= mass || weight < min || weight == 0.0) {
                return Some(i);
            }
            sum += weight;
        }
        all.then_some(candidates.len())
    }

    /// Draws from tokens in descending order.
    fn draw_from(&self, kept: &[Candidate], u: f64) -> TokenId {
        let total: f64 = kept.iter().map(|c| self.weight(c.1)).sum();
        let mut rest = u * total;
        for &(id, logit) in kept {
            rest -= self.weight(logit);
            if rest < 0.0 {
                return id;
            }
        }
        kept[kept.len() - 1].0 // the sum was rounded up
    }

    /// Draws from all tokens, in order of their ids: chunk by chunk, then within one chunk.
    fn draw_from_all(&self, logits: &[f32], u: f64) -> TokenId {
        const CHUNK: usize = 256;
        let mut rest = u * logits.chunks(CHUNK).map(|c| self.total(c)).sum::<f64>();
        let mut last = 0;
        for (c, chunk) in logits.chunks(CHUNK).enumerate() {
            let total = self.total(chunk);
            if rest >= total {
                rest -= total;
                continue;
            }
            for (i, &logit) in chunk.iter().enumerate() {
                let weight = self.weight(logit);
                if weight > 0.0 {
                    last = c * CHUNK + i;
                    rest -= weight;
                    if rest < 0.0 {
                        return last as TokenId;
                    }
                }
            }
        }
        // The sums were rounded differently: the last token that could have been drawn, or, if the
        // draw fell behind the last chunk, the most likely.
        if last > 0 {
            last as TokenId
        } else {
            best(self.isa, logits)
        }
    }
}

/// Logprobs of `token`, with the `k` most likely alternatives. The logits must be finite.
pub(crate) fn logprobs(
    isa: Isa,
    logits: &[f32],
    token: TokenId,
    k: u32,
    scratch: &mut Scratch,
) -> Logprobs {
    let softmax = Softmax {
        isa,
        max: highest(isa, logits),
        inv_temperature: 1.0,
    };
    let log_sum = f64::from(softmax.max) + softmax.total(logits).ln();
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let own = logits[token as usize];
    let (before, after) = logits.split_at(token as usize);
    let ahead =
        before.iter().filter(|&&l| l >= own).count() + after.iter().filter(|&&l| l > own).count();
    top(
        logits,
        (k as usize).min(logits.len()),
        &mut scratch.candidates,
    );
    Logprobs {
        token,
        logprob: logprob(own),
        rank: ahead as u32 + 1,
        top: scratch
            .candidates
            .iter()
            .map(|&(id, l)| (id, logprob(l)))
            .collect(),
    }
}

/// The `k` best tokens in descending order into `out`; the lower id first among equals.
///
/// One pass collects tokens above a bar. Each time twice as many as needed have come together, a
/// partial selection drops half of them and raises the bar: linear time, and hardly a token passes
/// the bar after the first few hundred.
fn top(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    let order = |a: &Candidate, b: &Candidate| {
        let by_logit = b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal);
        by_logit.then(a.0.cmp(&b.0))
    };
    out.clear();
    if k == 0 {
        return;
    }
    let mut bar = f32::NEG_INFINITY;
    let mut full = false;
    for (id, &logit) in logits.iter().enumerate() {
        // Ids ascend: an equal that comes later never displaces one that is in.
        if full && logit <= bar {
            continue;
        }
        out.push((id as TokenId, logit));
        if out.len() >= 2 * k.max(32) {
            out.select_nth_unstable_by(k - 1, order);
            out.truncate(k);
            bar = out[k - 1].1;
            full = true;
        }
    }
    out.sort_unstable_by(order);
    out.truncate(k);
}

/// Whether all logits are finite.
struct Finite<'a> {
    logits: &'a [f32],
    finite: &'a mut bool,
}

impl Kernel for Finite<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, _: V) {
        // Not `all`, which could stop early and so can't be turned into SIMD code.
        *self.finite = self
            .logits
            .iter()
            .fold(true, |finite, logit| finite & logit.is_finite());
    }
}

/// The highest logit.
struct Max<'a> {
    logits: &'a [f32],
    max: &'a mut f32,
}

impl Kernel for Max<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, _: V) {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (chunks, rest) = self.logits.as_chunks::<16>();
        for chunk in chunks {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane = if logit > *lane { logit } else { *lane };
            }
        }
        *self.max = lanes
            .iter()
            .chain(rest)
            .copied()
            .fold(f32::NEG_INFINITY, f32::max);
    }
}

/// Σ e^((logit - max) * scale): sixteen sums of float32 per 4096 logits, those in float64.
struct SumExp<'a> {
    logits: &'a [f32],
    max: f32,
    scale: f32,
    total: &'a mut f64,
}

impl Kernel for SumExp<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, _: V) {
        for span in self.logits.chunks(4096) {
            let mut lanes = [0.0f32; 16];
            let (chunks, rest) = span.as_chunks::<16>();
            for chunk in chunks {
                for (lane, logit) in lanes.iter_mut().zip(chunk) {
                    *lane += exp((logit - self.max) * self.scale);
                }
            }
            for (lane, logit) in lanes.iter_mut().zip(rest) {
                *lane += exp((logit - self.max) * self.scale);
            }
            *self.total += lanes.iter().map(|&l| f64::from(l)).sum::<f64>();
        }
    }
}
