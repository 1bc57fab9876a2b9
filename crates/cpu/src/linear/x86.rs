//! [`Lanes`] on x86-64: two AVX2 registers, or one of AVX-512.

use std::arch::x86_64::*;

use super::activations::{ActBlock, BLOCK, scales};
use super::lanes::{F32x16, Half16, I8x16, I32x16, Lanes, Line};

/// Calls intrinsics.
macro_rules! intrinsics {
    ($($body:tt)*) => {{
        // SAFETY: a value of the Lanes type exists only where the CPU has its instructions (see
        // `new`); memory is touched only through references to whole, aligned values.
        unsafe { $($body)* }
    }};
}

#[inline(always)]
fn prefetch<T>(at: *const T, near: bool) {
    // The second-level cache waits for more lines at once than the first; a line that is there stays
    // in the first one's way for a moment only.
    // SAFETY: a hint, whatever the address.
    unsafe {
        match near {
            true => _mm_prefetch::<_MM_HINT_T0>(at.cast()),
            false => _mm_prefetch::<_MM_HINT_T1>(at.cast()),
        }
    }
}

/// Halves added to halves.
#[inline(always)]
fn fold_add(value: __m256) -> f32 {
    intrinsics! {
        let four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

#[inline(always)]
fn fold_max(value: __m256) -> f32 {
    intrinsics! {
        let four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

/// AVX2, FMA and F16C; with `VNNI` also AVX-VNNI.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    /// # Safety
    /// The CPU has AVX2, FMA and F16C, and AVX-VNNI if `VNNI`.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }

    /// Without VNNI. The products of unsigned and signed bytes are added in pairs to 16 bits, which
    /// saturate: `q` must stay below 129 (128 · 127 · 2 < 2^15).
    #[inline(always)]
    fn dot4_narrow(self, acc: __m256i, q: __m256i, x: __m256i) -> __m256i {
        intrinsics! {
            let pairs = _mm256_maddubs_epi16(q, x);
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn dot4_half<const WIDE: bool>(self, acc: __m256i, q: __m256i, x: __m256i) -> __m256i {
        intrinsics! {
            if VNNI {
                _mm256_dpbusd_avx_epi32(acc, q, x)
            } else if WIDE {
                // q = half + rest, both at most 128.
                let half = _mm256_and_si256(_mm256_srli_epi16(q, 1), _mm256_set1_epi8(0x7f));
                let rest = _mm256_sub_epi8(q, half);
                self.dot4_narrow(self.dot4_narrow(acc, half, x), rest, x)
            } else {
                self.dot4_narrow(acc, q, x)
            }
        }
    }
}

impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    type I = [__m256i; 2];
    type F = [__m256; 2];
    type Q = [__m256i; 2];
    const TOKENS: usize = 4;

    #[inline(always)]
    fn prefetch<T>(self, at: *const T, near: bool) {
        prefetch(at, near);
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        intrinsics! { [_mm256_set1_epi32(value); 2] }
    }

    #[inline(always)]
    fn load_i(self, value: &I32x16) -> Self::I {
        let at = value.0.as_ptr().cast::<__m256i>();
        intrinsics! { [_mm256_load_si256(at), _mm256_load_si256(at.add(1))] }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: Self::Q, offset: u8) -> Line {
        let mut out = Line([0; 64]);
        let at = out.0.as_mut_ptr().cast::<__m256i>();
        intrinsics! {
            let offset = _mm256_set1_epi8(offset as i8);
            _mm256_store_si256(at, _mm256_sub_epi8(bytes[0], offset));
            _mm256_store_si256(at.add(1), _mm256_sub_epi8(bytes[1], offset));
        }
        out
    }

    #[inline(always)]
    fn bytes(self, line: &Line) -> Self::Q {
        let at = (&raw const line.0).cast::<__m256i>();
        intrinsics! { [_mm256_load_si256(at), _mm256_load_si256(at.add(1))] }
    }

    #[inline(always)]
    fn nibbles(self, line: &Line) -> (Self::Q, Self::Q) {
        let [a, b] = self.bytes(line);
        intrinsics! {
            let mask = _mm256_set1_epi8(0x0f);
            let low = [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)];
            let high = [
                _mm256_and_si256(_mm256_srli_epi16(a, 4), mask),
                _mm256_and_si256(_mm256_srli_epi16(b, 4), mask),
            ];
            (low, high)
        }
    }

    #[inline(always)]
    fn with_high(self, low: Self::Q, high: Self::Q, turn: u32, mask: u8) -> Self::Q {
        // There is no shift of bytes, but the mask drops what comes in from the neighbour.
        intrinsics! {
            let left = _mm_cvtsi32_si128(turn as i32);
            let right = _mm_cvtsi32_si128(8 - turn as i32);
            let mask = _mm256_set1_epi8(mask as i8);
            let mut out = low;
            for (out, high) in out.iter_mut().zip(high) {
                let high = match turn {
                    0..5 => _mm256_sll_epi16(high, left),
                    _ => _mm256_srl_epi16(high, right),
                };
                *out = _mm256_or_si256(*out, _mm256_and_si256(high, mask));
            }
            out
        }
    }

    #[inline(always)]
    fn dot4<const WIDE: bool>(self, acc: Self::I, q: Self::Q, x: i32) -> Self::I {
        let x = intrinsics! { _mm256_set1_epi32(x) };
        [
            self.dot4_half::<WIDE>(acc[0], q[0], x),
            self.dot4_half::<WIDE>(acc[1], q[1], x),
        ]
    }

    #[inline(always)]
    fn to_f(self, value: Self::I) -> Self::F {
        intrinsics! { [_mm256_cvtepi32_ps(value[0]), _mm256_cvtepi32_ps(value[1])] }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        intrinsics! { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, value: &F32x16) -> Self::F {
        let at = value.0.as_ptr();
        intrinsics! { [_mm256_load_ps(at), _mm256_load_ps(at.add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, value: &Half16) -> Self::F {
        let at = (&raw const value.0).cast::<__m128i>();
        intrinsics! {
            [_mm256_cvtph_ps(_mm_load_si128(at)), _mm256_cvtph_ps(_mm_load_si128(at.add(1)))]
        }
    }

    #[inline(always)]
    fn load_bf16(self, value: &Half16) -> Self::F {
        let at = (&raw const value.0).cast::<__m128i>();
        intrinsics! {
            let low = _mm256_cvtepu16_epi32(_mm_load_si128(at));
            let high = _mm256_cvtepu16_epi32(_mm_load_si128(at.add(1)));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
            ]
        }
    }

    #[inline(always)]
    fn load_i8(self, value: &I8x16) -> Self::F {
        let at = value.0.as_ptr();
        intrinsics! {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.add(8).cast()))),
            ]
        }
    }

    #[inline(always)]
    fn store(self, value: Self::F) -> F32x16 {
        let mut out = F32x16([0.0; 16]);
        let at = out.0.as_mut_ptr();
        intrinsics! {
            _mm256_store_ps(at, value[0]);
            _mm256_store_ps(at.add(8), value[1]);
        }
        out
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsics! { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsics! { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        intrinsics! { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn fold_add(self, value: Self::F) -> f32 {
        fold_add(intrinsics! { _mm256_add_ps(value[0], value[1]) })
    }

    #[inline(always)]
    fn fold_max(self, value: Self::F) -> f32 {
        fold_max(intrinsics! { _mm256_max_ps(value[0], value[1]) })
    }
}

/// AVX-512 F, BW, VL and VNNI.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU has AVX-512 F, BW, VL and VNNI.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

#[inline(always)]
fn upper(value: __m512) -> __m256 {
    intrinsics! { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(value))) }
}

impl Lanes for Avx512 {
    type I = __m512i;
    type F = __m512;
    type Q = __m512i;
    const TOKENS: usize = 8;

    #[inline(always)]
    fn prefetch<T>(self, at: *const T, near: bool) {
        prefetch(at, near);
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        intrinsics! { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn load_i(self, value: &I32x16) -> Self::I {
        intrinsics! { _mm512_load_si512((&raw const value.0).cast()) }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: Self::Q, offset: u8) -> Line {
        let mut out = Line([0; 64]);
        intrinsics! {
            let bytes = _mm512_sub_epi8(bytes, _mm512_set1_epi8(offset as i8));
            _mm512_store_si512((&raw mut out.0).cast(), bytes);
        }
        out
    }

    #[inline(always)]
    fn bytes(self, line: &Line) -> Self::Q {
        intrinsics! { _mm512_load_si512((&raw const line.0).cast()) }
    }

    #[inline(always)]
    fn nibbles(self, line: &Line) -> (Self::Q, Self::Q) {
        let bytes = self.bytes(line);
        intrinsics! {
            let mask = _mm512_set1_epi8(0x0f);
            let low = _mm512_and_si512(bytes, mask);
            let high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
            (low, high)
        }
    }

    #[inline(always)]
    fn with_high(self, low: Self::Q, high: Self::Q, turn: u32, mask: u8) -> Self::Q {
        intrinsics! {
            let high = match turn {
                0..5 => _mm512_sll_epi16(high, _mm_cvtsi32_si128(turn as i32)),
                _ => _mm512_srl_epi16(high, _mm_cvtsi32_si128(8 - turn as i32)),
            };
            _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(mask as i8)))
        }
    }

    #[inline(always)]
    fn dot4<const WIDE: bool>(self, acc: Self::I, q: Self::Q, x: i32) -> Self::I {
        intrinsics! { _mm512_dpbusd_epi32(acc, q, _mm512_set1_epi32(x)) }
    }

    #[inline(always)]
    fn to_f(self, value: Self::I) -> Self::F {
        intrinsics! { _mm512_cvtepi32_ps(value) }
    }

    #[inline(always)]
    fn quantize(self, x: &[f32; BLOCK], out: &mut ActBlock) {
        let at = x.as_ptr();
        let (first, second, max) = intrinsics! {
            let (first, second) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)));
            let magnitude = |x| _mm512_castps_si512(_mm512_abs_ps(x));
            let max = _mm512_max_epu32(magnitude(first), magnitude(second));
            (first, second, _mm512_reduce_max_epu32(max))
        };
        let (scale, inverse) = scales(max);
        intrinsics! {
            let inverse = _mm512_set1_ps(inverse);
            // To the nearest, ties to even; NaN becomes a number whose low byte is 0.
            let first = _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse));
            let second = _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse));
            let (first, second) = (_mm512_cvtepi32_epi8(first), _mm512_cvtepi32_epi8(second));
            let q = _mm256_set_m128i(second, first);
            _mm256_storeu_si256(out.words.as_mut_ptr().cast(), q);
            let sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
            let sums = _mm256_hadd_epi32(sums, sums);
            let sums = _mm256_hadd_epi32(sums, sums);
            out.set_scale(scale, _mm256_extract_epi32::<0>(sums), _mm256_extract_epi32::<4>(sums));
        }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        intrinsics! { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, value: &F32x16) -> Self::F {
        intrinsics! { _mm512_load_ps(value.0.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, value: &Half16) -> Self::F {
        intrinsics! { _mm512_cvtph_ps(_mm256_load_si256((&raw const value.0).cast())) }
    }

    #[inline(always)]
    fn load_bf16(self, value: &Half16) -> Self::F {
        intrinsics! {
            let bits = _mm256_load_si256((&raw const value.0).cast());
            _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
        }
    }

    #[inline(always)]
    fn load_i8(self, value: &I8x16) -> Self::F {
        intrinsics! {
            let bytes = _mm_load_si128(value.0.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        }
    }

    #[inline(always)]
    fn store(self, value: Self::F) -> F32x16 {
        let mut out = F32x16([0.0; 16]);
        intrinsics! { _mm512_store_ps(out.0.as_mut_ptr(), value) };
        out
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsics! { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsics! { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        intrinsics! { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn fold_add(self, value: Self::F) -> f32 {
        fold_add(intrinsics! { _mm256_add_ps(_mm512_castps512_ps256(value), upper(value)) })
    }

    #[inline(always)]
    fn fold_max(self, value: Self::F) -> f32 {
        fold_max(intrinsics! { _mm256_max_ps(_mm512_castps512_ps256(value), upper(value)) })
    }
}
