#![allow(clippy::unwrap_used)]

use half::f16;
use proptest::prelude::*;
use spate_model::quant::{GgmlType, QuantError, dequantize};

use super::*;

/// Weights of a type, from random bytes whose scales are made harmless.
struct Matrix {
    ty: GgmlType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1 .. 1.
    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn activations(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.signed() * 3.0).collect()
    }

    fn matrix(&mut self, ty: GgmlType, rows: usize, cols: usize) -> Matrix {
        let blocks = rows * cols / ty.block_elems();
        let mut bytes = Vec::with_capacity(blocks * ty.block_bytes());
        for _ in 0..blocks {
            let mut block: Vec<u8> = (0..ty.block_bytes()).map(|_| self.next() as u8).collect();
            for &at in half_fields(ty) {
                let half = f16::from_f32(self.signed() * 0.1);
                block[at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
            match ty {
                GgmlType::F32 => block.copy_from_slice(&self.signed().to_le_bytes()),
                GgmlType::BF16 => {
                    block.copy_from_slice(&half::bf16::from_f32(self.signed()).to_le_bytes());
                }
                _ => {}
            }
            bytes.extend(block);
        }
        Matrix {
            ty,
            rows,
            cols,
            bytes,
        }
    }
}

/// Where the float16 of a block are.
fn half_fields(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::F32 | GgmlType::BF16 => &[],
        GgmlType::F16
        | GgmlType::Q4_0
        | GgmlType::Q5_0
        | GgmlType::Q8_0
        | GgmlType::Iq4Nl
        | GgmlType::Iq4Xs => &[0],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
        GgmlType::Q2K => &[80, 82],
        GgmlType::Q3K => &[108],
        GgmlType::Q6K => &[208],
    }
}

impl Matrix {
    fn fast(&self, pool: &ThreadPool) -> LinearWeight {
        LinearWeight::fast(self.ty, (self.rows, self.cols), &self.bytes, pool).unwrap()
    }

    fn exact(&self, pool: &ThreadPool) -> LinearWeight {
        LinearWeight::exact(self.ty, (self.rows, self.cols), &self.bytes, pool).unwrap()
    }

    fn dequantized(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        dequantize(self.ty, &self.bytes, &mut out).unwrap();
        out
    }
}

fn product(isa: Isa, pool: &ThreadPool, weight: &LinearWeight, x: &[f32]) -> Vec<f32> {
    let m = x.len() / weight.cols();
    let mut out = vec![f32::NAN; m * weight.rows()];
    let mut scratch = Scratch::with_isa(isa, 0, 0);
    linear(pool, &[weight], x, m, &mut [&mut out], &mut scratch);
    out
}

/// For each output the float64 product and the sum of the magnitudes of its terms.
fn reference(matrix: &Matrix, x: &[f32]) -> Vec<(f64, f64)> {
    let weights = matrix.dequantized();
    let mut out = Vec::new();
    for x in x.chunks_exact(matrix.cols) {
        for row in weights.chunks_exact(matrix.cols) {
            let terms = row
                .iter()
                .zip(x)
                .map(|(&w, &x)| f64::from(w) * f64::from(x));
            out.push(terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs())));
        }
    }
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn shape() -> impl Strategy<Value = (GgmlType, usize, usize, usize, u64)> {
    let m = prop_oneof![4 => 1..34usize, 1 => 60..80usize];
    (
        0..GgmlType::ALL.len(),
        1..40usize,
        1..5usize,
        m,
        any::<u64>(),
    )
        .prop_map(|(ty, rows, blocks, m, seed)| {
            let ty = GgmlType::ALL[ty];
            let cols = blocks
                * if ty.block_elems() == 1 {
                    29
                } else {
                    ty.block_elems()
                };
            (ty, rows, cols, m, seed)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Every instruction set, any number of threads: the same bits, for any shape and type.
    #[test]
    fn all_instruction_sets_give_the_same_bits((ty, rows, cols, m, seed) in shape()) {
        let mut random = Random(seed);
        let matrix = random.matrix(ty, rows, cols);
        let x = random.activations(m * cols);
        let (one, three) = (ThreadPool::new(1).unwrap(), ThreadPool::new(3).unwrap());
        for weight in [matrix.fast(&one), matrix.exact(&three)] {
            let [scalar, others @ ..] = &Isa::available()[..] else { unreachable!() };
            let expected = bits(&product(*scalar, &one, &weight, &x));
            for isa in others {
                let got = bits(&product(*isa, &three, &weight, &x));
                prop_assert_eq!(&got, &expected, "{}", isa.name());
            }
        }
    }

    /// A token's outputs have the same bits alone and in any batch.
    #[test]
    fn a_token_does_not_see_its_neighbours((ty, rows, cols, m, seed) in shape()) {
        let mut random = Random(seed);
        let matrix = random.matrix(ty, rows, cols);
        let x = random.activations(m * cols);
        let pool = ThreadPool::new(2).unwrap();
        for weight in [matrix.fast(&pool), matrix.exact(&pool)] {
            for isa in Isa::available() {
                let batch = product(isa, &pool, &weight, &x);
                let alone: Vec<f32> =
                    x.chunks_exact(cols).flat_map(|x| product(isa, &pool, &weight, x)).collect();
                prop_assert_eq!(bits(&batch), bits(&alone), "{}", isa.name());
            }
        }
    }

    /// Against float64: `exact` within float32 rounding, `fast` within the rounding of activations
    /// to 8 bits (half a step of 1/127 of the largest of 32) and of scales to float16.
    #[test]
    fn results_are_close_to_float64((ty, rows, cols, m, seed) in shape()) {
        let mut random = Random(seed);
        let matrix = random.matrix(ty, rows, cols);
        let x = random.activations(m * cols);
        let pool = ThreadPool::new(1).unwrap();
        let expected = reference(&matrix, &x);
        let exact = product(Isa::best(), &pool, &matrix.exact(&pool), &x);
        for (got, (sum, size)) in exact.iter().zip(&expected) {
            prop_assert!((f64::from(*got) - sum).abs() <= 1e-5 * size + 1e-6, "{got} for {sum}");
        }
        let fast = product(Isa::best(), &pool, &matrix.fast(&pool), &x);
        let weights = matrix.dequantized();
        for (i, (got, (sum, size))) in fast.iter().zip(&expected).enumerate() {
            let row: f64 = weights[i % rows * cols..][..cols].iter().map(|w| f64::from(w.abs())).sum();
            let activations = if ty.scheme().is_some() { row * 3.0 / 127.0 / 2.0 } else { 0.0 };
            let scales = size * 2f64.powi(-10);
            prop_assert!((f64::from(*got) - sum).abs() <= activations + scales + 1e-5, "{got} for {sum}");
        }
    }

    /// Looking up a row gives the dequantised weights (with the scales of "K" types in float16).
    #[test]
    fn rows_come_back((ty, rows, cols, _, seed) in shape()) {
        let matrix = Random(seed).matrix(ty, rows, cols);
        let pool = ThreadPool::new(1).unwrap();
        let (exact, fast) = (matrix.exact(&pool), matrix.fast(&pool));
        let mut row = vec![0.0; cols];
        for (r, expected) in matrix.dequantized().chunks_exact(cols).enumerate() {
            exact.row_to_f32(r, &mut row);
            prop_assert_eq!(&row, &expected);
            fast.row_to_f32(r, &mut row);
            if ty.block_elems() < 256 {
                prop_assert_eq!(&row, &expected);
            } else {
                let largest = expected.iter().fold(0f32, |a, w| a.max(w.abs()));
                for (got, expected) in row.iter().zip(expected) {
                    prop_assert!((got - expected).abs() <= largest / 500.0, "{got} for {expected}");
                }
            }
        }
    }
}

#[test]
fn several_matrices_share_an_input() {
    let mut random = Random(7);
    let pool = ThreadPool::new(2).unwrap();
    let matrices = [
        random.matrix(GgmlType::Q4_1, 96, 64),
        random.matrix(GgmlType::F16, 17, 64),
        random.matrix(GgmlType::Q8_0, 1, 64),
    ];
    let weights = matrices.each_ref().map(|matrix| matrix.fast(&pool));
    for m in [1, 5] {
        let x = random.activations(m * 64);
        let mut outs = weights
            .each_ref()
            .map(|weight| vec![0.0; m * weight.rows()]);
        let mut views = outs.each_mut().map(|out| &mut out[..]);
        let mut scratch = Scratch::new(m, 64);
        linear(&pool, &weights.each_ref(), &x, m, &mut views, &mut scratch);
        for (weight, out) in weights.iter().zip(&outs) {
            assert_eq!(bits(out), bits(&product(Isa::best(), &pool, weight, &x)));
        }
    }
}

#[test]
fn an_activation_that_is_not_finite_spoils_its_token_only() {
    let mut random = Random(11);
    let pool = ThreadPool::new(1).unwrap();
    let matrix = random.matrix(GgmlType::Q4_0, 20, 96);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for isa in Isa::available() {
            let mut x = random.activations(3 * 96);
            x[96 + 40] = bad;
            let out = product(isa, &pool, &matrix.fast(&pool), &x);
            for (i, value) in out.iter().enumerate() {
                assert_eq!(
                    value.is_finite(),
                    i / 20 != 1,
                    "{bad}, {}, output {i}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn tiny_and_huge_activations_quantise() {
    let pool = ThreadPool::new(1).unwrap();
    let matrix = Random(3).matrix(GgmlType::Q8_0, 16, 32);
    for scale in [0.0, 1e-40, 1e-20, 1e20] {
        let x = [scale; 32];
        let out = product(Isa::best(), &pool, &matrix.fast(&pool), &x);
        for (got, (sum, size)) in out.iter().zip(reference(&matrix, &x)) {
            assert!(
                (f64::from(*got) - sum).abs() <= size * 1e-5 + 1e-36,
                "{got} for {sum}"
            );
        }
    }
}

#[test]
fn bytes_that_do_not_fit_the_shape_are_refused() {
    let pool = ThreadPool::new(1).unwrap();
    let matrix = Random(5).matrix(GgmlType::Q4K, 2, 256);
    for build in [LinearWeight::exact, LinearWeight::fast] {
        let new = |rows, cols, len: usize| {
            build(matrix.ty, (rows, cols), &matrix.bytes[..len], &pool)
                .map(|_| ())
                .unwrap_err()
        };
        let all = matrix.bytes.len();
        assert!(matches!(new(2, 256, all - 1), QuantError::Length { .. }));
        assert!(matches!(new(3, 256, all), QuantError::Length { .. }));
        assert!(matches!(new(4, 128, all), QuantError::PartialBlock { .. }));
        assert!(matches!(new(0, 256, 0), QuantError::Empty { .. }));
        assert!(matches!(new(2, 0, 0), QuantError::Empty { .. }));
        assert!(matches!(
            new(usize::MAX, 256, all),
            QuantError::TooLarge { .. }
        ));
    }
}

#[test]
fn sizes_are_known_before() {
    let mut random = Random(5);
    let pool = ThreadPool::new(1).unwrap();
    for ty in GgmlType::ALL {
        for (rows, cols) in [(1, 256), (48, 512)] {
            let matrix = random.matrix(ty, rows, cols);
            let shape = (rows, cols);
            let exact = LinearWeight::exact(ty, shape, &matrix.bytes, &pool).unwrap();
            assert_eq!(exact.bytes() as u64, LinearWeight::exact_bytes(shape));
            let fast = LinearWeight::fast(ty, shape, &matrix.bytes, &pool).unwrap();
            assert_eq!(
                fast.bytes() as u64,
                LinearWeight::fast_bytes(ty, shape),
                "{ty}"
            );
        }
    }
}
