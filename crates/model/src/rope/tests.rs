#![allow(clippy::unwrap_used)]

use super::*;

fn rope(dims: usize, base: f32, scaling: RopeScaling) -> Rope {
    Rope {
        pairing: RopePairing::Halves,
        dims,
        base,
        scaling,
    }
}

fn close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g / w - 1.0).abs() < 1e-6, "pair {i}: {g}, not {w}");
    }
}

/// Unscaled inverse frequencies, as the reference implementations call the rates.
fn inverse_frequencies(dims: usize, base: f64) -> Vec<f64> {
    let pairs = (0..dims).step_by(2);
    pairs
        .map(|i| 1.0 / base.powf(i as f64 / dims as f64))
        .collect()
}

#[test]
fn rates_are_divided() {
    let rates = |scaling| rope(4, 100.0, scaling).rotation(1).rates;
    close(&rates(RopeScaling::None), &[1.0, 0.1]);
    close(&rates(RopeScaling::Linear { factor: 4.0 }), &[0.25, 0.025]);
    close(&rates(RopeScaling::Divisors(vec![2.0, 5.0])), &[0.5, 0.02]);
}

/// With the parameters of Llama 3.1, by the wavelengths of its reference implementation.
#[test]
fn llama3_keeps_short_waves_and_stretches_long_ones() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    let got = rope(128, 500_000.0, scaling).rotation(131_072);
    let (mut kept, mut blended, mut stretched) = (0, 0, 0);
    let scale = |rate: f64| {
        let wave_length = TAU / rate;
        if wave_length < 8192.0 / 4.0 {
            kept += 1;
            rate
        } else if wave_length > 8192.0 / 1.0 {
            stretched += 1;
            rate / 8.0
        } else {
            blended += 1;
            let smooth = (8192.0 / wave_length - 1.0) / (4.0 - 1.0);
            (1.0 - smooth) * rate / 8.0 + smooth * rate
        }
    };
    let plain = inverse_frequencies(128, 500_000.0);
    close(
        &got.rates,
        &plain.into_iter().map(scale).collect::<Vec<_>>(),
    );
    assert_eq!((kept, blended, stretched), (29, 6, 29));
    assert_eq!(got.magnitude, 1.0);
}

/// With the parameters of Qwen 2.5 at 131,072 positions, by the steps of the YaRN authors' code.
#[test]
fn yarn_blends_along_a_ramp() {
    let (dims, base, context) = (128, 1e6, 32_768.0);
    let scaling = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: 32_768,
        magnitude: yarn_magnitude(4.0),
    };
    let got = rope(dims, base as f32, scaling).rotation(131_072);
    let correction =
        |rotations: f64| dims as f64 * (context / (rotations * TAU)).ln() / (2.0 * f64::ln(base));
    let (low, high) = (correction(32.0).floor(), correction(1.0).ceil());
    assert_eq!((low, high), (23.0, 40.0));
    let plain = inverse_frequencies(dims, base);
    let want = plain.iter().enumerate().map(|(i, rate)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let mask = 1.0 - ramp;
        rate / 4.0 * (1.0 - mask) + rate * mask
    });
    close(&got.rates, &want.collect::<Vec<_>>());
    close(&got.rates[..24], &plain[..24]);
    assert!((got.magnitude - 1.138_629_4).abs() < 1e-6);
    assert_eq!(yarn_magnitude(0.5), 1.0);
}

#[test]
fn long_rope_chooses_by_the_longest_sequence() {
    // Phi 3 Mini 128k's magnitude.
    let magnitude = long_rope_magnitude(131_072, 4096);
    assert!((magnitude - 1.190_238).abs() < 1e-6);
    assert_eq!(long_rope_magnitude(4096, 4096), 1.0);
    let scaling = RopeScaling::LongRope {
        short: vec![1.0, 1.5],
        long: vec![2.0, 20.0],
        original_context: 4096,
        magnitude,
    };
    let rope = rope(4, 100.0, scaling);
    let (short, long) = (rope.rotation(4096), rope.rotation(4097));
    close(&short.rates, &[1.0, 0.1 / 1.5]);
    close(&long.rates, &[0.5, 0.005]);
    assert_eq!(short.magnitude, f64::from(magnitude));
    assert_eq!(long.magnitude, f64::from(magnitude));
}

#[test]
fn nonsense_is_named() {
    let yarn = |original_context, beta_fast| RopeScaling::Yarn {
        factor: 4.0,
        beta_fast,
        beta_slow: 1.0,
        original_context,
        magnitude: 1.0,
    };
    let llama3 = |high_freq_factor| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor,
        original_context: 64,
    };
    for (dims, base, scaling, why) in [
        (0, 1e4, RopeScaling::None, "none, odd or wider"),
        (7, 1e4, RopeScaling::None, "none, odd or wider"),
        (10, 1e4, RopeScaling::None, "none, odd or wider"),
        (8, 0.0, RopeScaling::None, "rope base 0"),
        (8, f32::NAN, RopeScaling::None, "rope base NaN"),
        (8, 1e4, RopeScaling::Linear { factor: -1.0 }, "factor -1"),
        (
            8,
            1e4,
            RopeScaling::Divisors(vec![1.0; 3]),
            "3 rope factors for 4",
        ),
        (
            8,
            1e4,
            yarn(0, 32.0),
            "original context of rope scaling is 0",
        ),
        (8, 1e4, yarn(64, f32::INFINITY), "beta_fast inf"),
        (8, 1.0, yarn(64, 32.0), "base above 1"),
        (8, 1e4, llama3(1.0), "high_freq_factor - low_freq_factor 0"),
    ] {
        let problem = rope(dims, base, scaling).check(8).unwrap_err();
        assert!(problem.contains(why), "{problem}");
    }
    assert_eq!(rope(8, 1e4, llama3(4.0)).check(8), Ok(()));
    assert_eq!(rope(8, 1e4, yarn(64, 32.0)).check(8), Ok(()));
}

#[test]
fn only_slow_pairs_and_unrotated_elements_are_common() {
    let rotation = Rotation {
        rates: vec![1.0, 1e-3, 1e-5],
        magnitude: 2.0,
    };
    let held = |pairing, max_seq_len| {
        let mut keys: Vec<f32> = (1..=16).map(|x| x as f32).collect();
        rotation.common_part(&mut keys, 8, pairing, max_seq_len);
        keys
    };
    let halves = [
        [0.0, 0.0, 6.0, 0.0, 0.0, 12.0, 7.0, 8.0],
        [0.0, 0.0, 22.0, 0.0, 0.0, 28.0, 15.0, 16.0],
    ];
    assert_eq!(held(RopePairing::Halves, 1000), halves.concat());
    let interleaved = held(RopePairing::Interleaved, 999);
    assert_eq!(interleaved[..8], [0.0, 0.0, 6.0, 8.0, 10.0, 12.0, 7.0, 8.0]);
}
