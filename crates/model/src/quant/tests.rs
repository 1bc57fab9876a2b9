#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;

use super::*;

/// A block of bytes that look random, with 0.5 and 0.25 in the places of its float16.
fn sample_block(ty: GgmlType) -> Vec<u8> {
    let halves: &[usize] = match ty {
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
        GgmlType::Q2K => &[80, 82],
        GgmlType::Q3K => &[108],
        GgmlType::Q6K => &[208],
        _ => &[0],
    };
    let mut block: Vec<u8> = (0..ty.block_bytes())
        .map(|i| (i * i * 37 + i * 11 + 5) as u8)
        .collect();
    for (&at, value) in halves.iter().zip([0.5, 0.25]) {
        block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    }
    block
}

/// Some weights of each sample block, and the sum of all weights times their number (from 1 on), by
/// another implementation: `gguf.quants.dequantize` of the Python package gguf 0.19.0.
#[test]
fn blocks_agree_with_another_implementation() {
    const SMALL: [usize; 5] = [0, 1, 15, 16, 31];
    const LARGE: [usize; 8] = [0, 1, 17, 40, 77, 131, 200, 255];
    let expected: &[(GgmlType, &[f32], f32)] = &[
        (GgmlType::Q4_0, &[3.5, -2.5, -1.5, 1.0, 0.0], 0.5),
        (GgmlType::Q4_1, &[0.75, 4.75, 1.75, 4.25, 0.25], 2138.0),
        (GgmlType::Q5_0, &[5.5, 3.5, -3.5, 3.5, 5.0], -54.5),
        (GgmlType::Q5_1, &[14.75, 6.75, 11.75, 12.75, 3.75], 4927.0),
        (GgmlType::Q8_0, &[-40.5, 57.5, -61.5, -48.5, -21.5], -928.0),
        (
            GgmlType::Q2K,
            &[2.5, 2.5, 1.75, 20.0, -1.5, 17.25, 7.75, 7.0],
            151_107.0,
        ),
        (
            GgmlType::Q3K,
            &[-5.5, -5.5, -5.5, -15.5, -17.0, 27.0, -15.0, 6.0],
            -67_651.0,
        ),
        (
            GgmlType::Q4K,
            &[-4.75, -4.75, -4.75, 42.75, 19.75, 52.25, 107.75, 142.5],
            4_193_720.0,
        ),
        (
            GgmlType::Q5K,
            &[3.25, 3.25, 3.25, 117.75, 19.75, 52.25, 259.75, 173.5],
            8_970_968.0,
        ),
        (
            GgmlType::Q6K,
            &[
                -379.5, -379.5, 60.5, -246.5, 1008.0, -332.5, -1081.5, -212.5,
            ],
            -971_248.0,
        ),
        (GgmlType::Iq4Nl, &[56.5, -32.5, -17.5, 12.5, 0.5], 568.5),
        (
            GgmlType::Iq4Xs,
            &[586.5, 586.5, -884.0, -420.0, 58.5, 513.0, -402.5, -445.0],
            1_297_803.5,
        ),
    ];
    for (ty, values, sum) in expected {
        let mut out = vec![0.0; ty.block_elems()];
        dequantize(*ty, &sample_block(*ty), &mut out).unwrap();
        let places = if out.len() == 32 {
            &SMALL[..]
        } else {
            &LARGE[..]
        };
        let got: Vec<f32> = places.iter().map(|&i| out[i]).collect();
        assert_eq!(&got, values, "{ty}");
        let got: f64 = (1..)
            .zip(&out)
            .map(|(i, w)| f64::from(i) * f64::from(*w))
            .sum();
        assert_eq!(got, f64::from(*sum), "{ty}");
    }
}

#[test]
fn a_q4_1_block_by_hand() {
    // Scale 2, minimum -3; low nibbles 0 1 2 … 15, high nibbles 15 14 13 … 0.
    let mut block = vec![0x00, 0x40, 0x00, 0xc2];
    block.extend((0..16).map(|i: u8| i | ((15 - i) << 4)));
    let mut out = [0.0; 32];
    dequantize(GgmlType::Q4_1, &block, &mut out).unwrap();
    for i in 0..16 {
        assert_eq!(out[i], 2.0 * i as f32 - 3.0);
        assert_eq!(out[16 + i], 2.0 * (15 - i) as f32 - 3.0);
    }
}

#[test]
fn a_q5_0_block_by_hand() {
    // Scale 1, all nibbles 3, the fifth bit of weights 0, 9 and 31: 3 - 16, or 19 - 16.
    let mut block = vec![0x00, 0x3c, 0x01, 0x02, 0x00, 0x80];
    block.extend([0x33; 16]);
    let mut out = [0.0; 32];
    dequantize(GgmlType::Q5_0, &block, &mut out).unwrap();
    for (i, value) in out.into_iter().enumerate() {
        assert_eq!(
            value,
            if [0, 9, 31].contains(&i) { 3.0 } else { -13.0 },
            "weight {i}"
        );
    }
}

#[test]
fn floats_by_hand() {
    let mut out = [0.0; 2];
    dequantize(
        GgmlType::F32,
        &[0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0],
        &mut out,
    )
    .unwrap();
    assert_eq!(out, [1.0, -2.5]);
    dequantize(GgmlType::F16, &[0x00, 0x3c, 0x00, 0xc1], &mut out).unwrap();
    assert_eq!(out, [1.0, -2.5]);
    dequantize(GgmlType::BF16, &[0x80, 0x3f, 0x20, 0xc0], &mut out).unwrap();
    assert_eq!(out, [1.0, -2.5]);
}

/// Quantises 32 weights to the nearest representable value; the scale and minimum are those of the
/// range. Written from the layouts' definitions, the other way round.
fn quantize(ty: GgmlType, weights: &[f32]) -> Vec<u8> {
    let scheme = ty.scheme().unwrap();
    let levels = (1u32 << scheme.bits) as f32;
    let low = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let high = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (scale, min) = match scheme.has_min {
        true => ((high - low) / (levels - 1.0), low),
        false => (low.abs().max(high.abs()) / (levels / 2.0 - 1.0), 0.0),
    };
    let (scale, min) = (f16::from_f32(scale), f16::from_f32(min));
    let q: Vec<u8> = weights
        .iter()
        .map(|w| {
            let q =
                ((w - min.to_f32()) / scale.to_f32().max(1e-9)).round() + f32::from(scheme.offset);
            q.clamp(0.0, levels - 1.0) as u8
        })
        .collect();

    let mut block = scale.to_le_bytes().to_vec();
    if scheme.has_min {
        block.extend(min.to_le_bytes());
    }
    if scheme.bits == 8 {
        block.extend(q.iter().map(|q| q.wrapping_sub(128)));
        return block;
    }
    if scheme.bits == 5 {
        let fifth = q
            .iter()
            .rev()
            .fold(0u32, |bits, q| (bits << 1) | u32::from(q >> 4));
        block.extend(fifth.to_le_bytes());
    }
    block.extend((0..16).map(|i| (q[i] & 0x0f) | (q[i + 16] << 4)));
    block
}

proptest! {
    /// What was quantised comes back within the format's step.
    #[test]
    fn round_trips(weights in prop::collection::vec(-1f32..1.0, 32)) {
        for ty in [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q5_0, GgmlType::Q5_1, GgmlType::Q8_0] {
            let scheme = ty.scheme().unwrap();
            let mut out = [0.0; 32];
            dequantize(ty, &quantize(ty, &weights), &mut out).unwrap();
            // Half a step of a range that is 2 wide at most, and the float16 rounding of its ends.
            let bound = 1.0 / ((1u32 << scheme.bits) as f32 - 2.0) + 3e-3;
            for (got, weight) in out.iter().zip(&weights) {
                prop_assert!((got - weight).abs() <= bound, "{ty}: {weight} became {got}");
            }
        }
    }

    /// Any bytes are a block: no panic, and the integers stay inside the scheme's bits.
    #[test]
    fn any_bytes_unpack(bytes in prop::collection::vec(any::<u8>(), 210)) {
        let mut unpacked = Unpacked::default();
        for ty in GgmlType::ALL {
            let Some(scheme) = ty.scheme() else { continue };
            unpack(ty, &bytes[..ty.block_bytes()], &mut unpacked);
            let q = &unpacked.q[..ty.block_elems()];
            prop_assert!(q.iter().all(|&q| u32::from(q) < 1 << scheme.bits), "{ty}");
        }
    }
}

#[test]
fn type_numbers() {
    let known: Vec<GgmlType> = (0..256)
        .filter_map(|id| GgmlType::from_u32(id).ok())
        .collect();
    assert_eq!(known, GgmlType::ALL);
    let iq = GgmlType::from_u32(21).unwrap_err();
    assert_eq!(iq, QuantError::Unsupported { name: "IQ3_S" });
    assert!(iq.to_string().contains("IQ3_S is not supported"), "{iq}");
    assert!(iq.to_string().contains("Q4_K, Q5_K, Q6_K"), "{iq}");
    assert_eq!(
        GgmlType::from_u32(u32::MAX),
        Err(QuantError::Unknown { id: u32::MAX })
    );
}

#[test]
fn sizes_are_checked() {
    assert_eq!(GgmlType::Q4_1.row_bytes(576), Ok(360));
    assert_eq!(GgmlType::Q6K.row_bytes(512), Ok(420));
    assert_eq!(GgmlType::F16.row_bytes(3), Ok(6));
    assert_eq!(
        GgmlType::Q4K.row_bytes(288),
        Err(QuantError::PartialBlock {
            ty: GgmlType::Q4K,
            cols: 288
        })
    );
    assert_eq!(
        GgmlType::F32.row_bytes(usize::MAX),
        Err(QuantError::TooLarge {
            ty: GgmlType::F32,
            cols: usize::MAX
        })
    );
    let short = dequantize(GgmlType::Q8_0, &[0; 33], &mut [0.0; 32]).unwrap_err();
    assert_eq!(
        short.to_string(),
        "32 weights of type Q8_0 take 34 bytes, but there are 33"
    );
}
