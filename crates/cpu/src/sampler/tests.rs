#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use spate_executor::Bind;

use super::*;

fn slot(sampling: SamplingParams, prompt: &[TokenId]) -> SlotState {
    let seed = sampling.seed;
    SlotState::new(Bind {
        prompt: prompt.into(),
        sampling: Arc::new(sampling),
        seed,
    })
}

fn choose(logits: &[f32], slot: &SlotState, position: u32) -> SampledToken {
    let mut copy = logits.to_vec();
    let token = sample(
        Isa::best(),
        &mut copy,
        slot,
        position,
        None,
        &mut Scratch::default(),
    );
    assert_eq!(copy, logits, "the logits are put back");
    token
}

fn random(temperature: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        ..SamplingParams::default()
    }
}

/// Numbers without a pattern, roughly -scale .. scale.
fn logits(seed: u64, count: u32, scale: f64) -> Vec<f32> {
    (0..count)
        .map(|i| ((uniform(seed, i) * 2.0 - 1.0) * scale) as f32)
        .collect()
}

/// The probabilities after all filters, from the definitions.
fn reference(logits: &[f32], p: &SamplingParams) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    let weight =
        |i: usize| (f64::from(logits[i] - logits[order[0]]) / f64::from(p.temperature)).exp();
    let mut kept = order.clone();
    if p.top_k > 0 {
        kept.truncate(p.top_k as usize);
    }
    let total: f64 = kept.iter().map(|&i| weight(i)).sum();
    let mut sum = 0.0;
    let mut len = 0;
    while len < kept.len() && (len == 0 || p.top_p >= 1.0 || sum < f64::from(p.top_p) * total) {
        sum += weight(kept[len]);
        len += 1;
    }
    kept.truncate(len);
    kept.retain(|&i| weight(i) >= f64::from(p.min_p));
    let total: f64 = kept.iter().map(|&i| weight(i)).sum();
    let mut probabilities = vec![0.0; logits.len()];
    kept.iter()
        .for_each(|&i| probabilities[i] = weight(i) / total);
    probabilities
}

/// Pearson's chi-square test at about 1e-5, by Wilson and Hilferty's normal approximation; tokens
/// that are expected less than five times count as one.
fn assert_distribution(logits: &[f32], params: &SamplingParams) {
    const DRAWS: u32 = 5_000;
    let slot = slot(params.clone(), &[0]);
    let mut counts: HashMap<TokenId, f64> = HashMap::new();
    for position in 0..DRAWS {
        *counts
            .entry(choose(logits, &slot, position).token)
            .or_default() += 1.0;
    }
    let mut chi_square = 0.0;
    let mut cells: f64 = 0.0;
    let (mut rare_expected, mut rare_seen) = (0.0, 0.0);
    for (token, probability) in reference(logits, params).into_iter().enumerate() {
        let seen = counts.get(&(token as TokenId)).copied().unwrap_or(0.0);
        let expected = probability * f64::from(DRAWS);
        assert!(
            expected > 0.0 || seen == 0.0,
            "token {token} was filtered out, yet drawn"
        );
        if expected < 5.0 {
            rare_expected += expected;
            rare_seen += seen;
        } else {
            chi_square += (seen - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    if rare_expected >= 5.0 {
        chi_square += (rare_seen - rare_expected).powi(2) / rare_expected;
        cells += 1.0;
    }
    let freedom = (cells - 1.0).max(1.0);
    let spread = 2.0 / (9.0 * freedom);
    let z = ((chi_square / freedom).cbrt() - (1.0 - spread)) / spread.sqrt();
    assert!(
        z < 4.3,
        "chi-square {chi_square:.1} at {freedom} degrees of freedom: {params:?}"
    );
}

#[test]
fn draws_follow_the_distribution() {
    let few = logits(1, 40, 3.0);
    let many = logits(2, 700, 4.0);
    for seed in [0, 99] {
        for base in [random(1.0), random(0.5), random(1.7)] {
            let base = SamplingParams { seed, ..base };
            assert_distribution(&few, &base);
            assert_distribution(
                &few,
                &SamplingParams {
                    top_k: 7,
                    ..base.clone()
                },
            );
            assert_distribution(
                &few,
                &SamplingParams {
                    top_p: 0.6,
                    ..base.clone()
                },
            );
            assert_distribution(
                &few,
                &SamplingParams {
                    min_p: 0.2,
                    ..base.clone()
                },
            );
            let all = SamplingParams {
                top_k: 20,
                top_p: 0.9,
                min_p: 0.05,
                ..base
            };
            assert_distribution(&few, &all);
        }
        // Ends that lie behind the first candidates, and sums over more than one chunk.
        let base = SamplingParams {
            seed,
            ..random(2.0)
        };
        assert_distribution(&many, &base);
        assert_distribution(
            &many,
            &SamplingParams {
                top_p: 0.95,
                ..base.clone()
            },
        );
        assert_distribution(
            &many,
            &SamplingParams {
                min_p: 0.05,
                ..base
            },
        );
    }
}

#[test]
fn equal_draws_for_equal_seeds_and_positions() {
    let logits = logits(3, 300, 2.0);
    let at = |seed, position| {
        let params = SamplingParams {
            seed,
            ..random(1.0)
        };
        choose(&logits, &slot(params, &[0]), position).token
    };
    let draws: Vec<TokenId> = (0..50).map(|p| at(7, p)).collect();
    assert_eq!(draws, (0..50).map(|p| at(7, p)).collect::<Vec<_>>());
    assert_ne!(draws, (0..50).map(|p| at(8, p)).collect::<Vec<_>>());
    assert_ne!(draws, (50..100).map(|p| at(7, p)).collect::<Vec<_>>());
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let slot = slot(SamplingParams::default(), &[0]);
    assert_eq!(choose(&[1.0, 3.0, -0.0, 3.0], &slot, 0).token, 1);
    assert_eq!(choose(&[-0.0, 0.0], &slot, 0).token, 0);
    assert_eq!(choose(&[-5.0], &slot, 0).token, 0);
}

#[test]
fn biases_bans_and_penalties() {
    let logits = [1.0, 2.0, 3.0, -1.0, 0.5];
    let greedy = |params: SamplingParams, prompt: &[TokenId], output: &[TokenId]| {
        let mut slot = slot(params, prompt);
        output.iter().for_each(|&token| slot.sampled(token));
        choose(&logits, &slot, 9).token
    };
    let p = SamplingParams::default;
    assert_eq!(greedy(p(), &[0], &[]), 2);
    assert_eq!(
        greedy(
            SamplingParams {
                logit_bias: vec![(3, 4.5)],
                ..p()
            },
            &[0],
            &[]
        ),
        3
    );
    assert_eq!(
        greedy(
            SamplingParams {
                logit_bias: vec![(2, -1.5)],
                ..p()
            },
            &[0],
            &[]
        ),
        1
    );

    // Banned below min_tokens, whatever the bias.
    let ban = SamplingParams {
        logit_bias: vec![(2, 100.0)],
        min_tokens: 2,
        min_tokens_banned: vec![2],
        ..p()
    };
    assert_eq!(greedy(ban.clone(), &[0], &[4]), 1);
    assert_eq!(greedy(ban.clone(), &[0], &[4, 4]), 2);
    let drawn = SamplingParams {
        temperature: 5.0,
        ..ban
    };
    let slot_of_drawn = slot(drawn, &[0]);
    assert!((0..500).all(|p| choose(&logits, &slot_of_drawn, p).token != 2));

    // Repetition counts the prompt; presence and frequency do not.
    let repetition = SamplingParams {
        repetition_penalty: 1.6,
        ..p()
    };
    assert_eq!(greedy(repetition.clone(), &[2], &[]), 1);
    assert_eq!(greedy(repetition.clone(), &[0], &[2]), 1);
    assert_eq!(greedy(repetition, &[0, 1, 2, 4], &[]), 2);
    let presence = SamplingParams {
        presence_penalty: 1.5,
        ..p()
    };
    assert_eq!(greedy(presence.clone(), &[2], &[]), 2);
    assert_eq!(greedy(presence, &[0], &[2, 2]), 1);
    let frequency = SamplingParams {
        frequency_penalty: 0.6,
        ..p()
    };
    assert_eq!(greedy(frequency.clone(), &[2], &[2]), 2);
    assert_eq!(greedy(frequency, &[0], &[2, 2]), 1);
    // A negative logit is multiplied.
    let negative = SamplingParams {
        repetition_penalty: 2.0,
        logit_bias: (0..5).filter(|&i| i != 3).map(|i| (i, -4.2)).collect(),
        ..p()
    };
    assert_eq!(greedy(negative.clone(), &[0], &[]), 3);
    assert_eq!(greedy(negative, &[3], &[]), 2);
}

#[test]
fn logprobs_are_of_the_raw_distribution() {
    let logits = [1.0, 2.0, 3.0, 2.0];
    let params = SamplingParams {
        logit_bias: vec![(2, -100.0)],
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let sampled = choose(&logits, &slot(params, &[0]), 0);
    let logprobs = sampled.logprobs.unwrap();
    let log_sum = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
    let want = |i: usize| (f64::from(logits[i]) - log_sum) as f32;
    assert_eq!((sampled.token, logprobs.token, logprobs.rank), (1, 1, 2));
    assert!((logprobs.logprob - want(1)).abs() < 1e-6);
    assert_eq!(
        logprobs.top.iter().map(|t| t.0).collect::<Vec<_>>(),
        [2, 1, 3]
    );
    assert!(
        logprobs
            .top
            .iter()
            .all(|t| (t.1 - want(t.0 as usize)).abs() < 1e-6)
    );
}

#[test]
fn odd_parameters_choose_some_token() {
    let logits = logits(5, 100, 5.0);
    for params in [
        SamplingParams {
            top_k: u32::MAX,
            top_p: 1e-9,
            ..random(1e-30)
        },
        SamplingParams {
            top_p: f32::NAN,
            min_p: f32::NAN,
            ..random(f32::NAN)
        },
        SamplingParams {
            repetition_penalty: 1e-38,
            ..random(1.0)
        },
        SamplingParams {
            min_tokens: 9,
            min_tokens_banned: (0..100).collect(),
            ..random(1.0)
        },
        SamplingParams {
            logprobs: Some(u32::MAX),
            top_k: 1,
            ..random(f32::MAX)
        },
    ] {
        assert!(choose(&logits, &slot(params, &[3, 4]), 1).token < 100);
    }
}

#[test]
fn finite_finds_each_kind() {
    let mut logits = vec![0.5; 37];
    assert!(finite(Isa::best(), &logits));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 16, 36] {
            logits[at] = bad;
            assert!(!finite(Isa::best(), &logits), "{bad} at {at}");
            logits[at] = 0.5;
        }
    }
}

proptest! {
    #[test]
    fn top_is_the_head_of_the_sorted_list(
        // Few values, so that there are many equals.
        logits in prop::collection::vec((-20i32..20).prop_map(|v| v as f32 / 4.0), 1..700),
        k in 0usize..200,
    ) {
        let mut want: Vec<Candidate> = logits.iter().enumerate().map(|(i, &l)| (i as u32, l)).collect();
        want.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        want.truncate(k);
        let mut got = Vec::new();
        top(&logits, k, &mut got);
        prop_assert_eq!(&got, &want);

        let mut scratch = Scratch::default();
        for (rank, &(token, _)) in want.iter().enumerate() {
            let l = logprobs(Isa::best(), &logits, token, 0, &mut scratch);
            prop_assert_eq!(l.rank as usize, rank + 1);
        }
    }
}
