//! Elementwise functions, written so that the compiler turns loops over them into SIMD code.
//!
//! They use additions and multiplications that are each rounded, and bit operations, so a value has
//! the same bits on every instruction set.

use std::f32::consts::LOG2_E;

use spate_model::Activation;

use crate::linear::{Kernel, Lanes};

/// ln 2 in two parts: the first has few bits, so that `n * LN2_HIGH` is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// Adding it to a small number rounds that to an integer, which the low bits of the sum then hold.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23

/// e^x to about 2 ulp (the polynomial of Cephes' `expf`, S. Moshier); 0 where the result would be
/// subnormal, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.336_54, 88.376_26);
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p * r + c;
    }
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127);
    let y = (p * r * r + r + 1.0) * f32::from_bits(exponent << 23);
    if x < -87.336_54 { 0.0 } else { y }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// x/2 (1 + tanh u) = x / (1 + e^(-2u)).
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let u = SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x);
    x / (1.0 + exp(-2.0 * u))
}

/// `out = activation(gate) * up`.
pub(crate) struct ActMul<'a> {
    pub(crate) activation: Activation,
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for ActMul<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, _: V) {
        let inputs = self.gate.iter().zip(self.up);
        let each = self.out.iter_mut().zip(inputs);
        match self.activation {
            Activation::Silu => each.for_each(|(out, (g, u))| *out = silu(*g) * u),
            Activation::GeluTanh => each.for_each(|(out, (g, u))| *out = gelu_tanh(*g) * u),
        }
    }
}

/// `out = x / rms(x) * norm`, where rms(x) = sqrt(mean(x^2) + eps).
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) norm: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, _: V) {
        let mean = sum_of_squares(self.x) / self.x.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        let inputs = self.x.iter().zip(self.norm);
        for (out, (x, norm)) in self.out.iter_mut().zip(inputs) {
            *out = x * scale * norm;
        }
    }
}

/// `residual += x / rms(x) * norm`.
pub(crate) struct AddRmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) norm: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) residual: &'a mut [f32],
}

impl Kernel for AddRmsNorm<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self, _: V) {
        let mean = sum_of_squares(self.x) / self.x.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        let inputs = self.x.iter().zip(self.norm);
        for (residual, (x, norm)) in self.residual.iter_mut().zip(inputs) {
            *residual += x * scale * norm;
        }
    }
}

/// [`RmsNorm`] in place.
#[inline(always)]
pub(crate) fn rms_norm_in_place(x: &mut [f32], norm: &[f32], eps: f32) {
    let mean = sum_of_squares(x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for (x, norm) in x.iter_mut().zip(norm) {
        *x = *x * scale * norm;
    }
}

/// Sixteen partial sums, then their sum from left to right.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (got / want - 1.0).abs() < 3e-7,
                "exp({x}) = {got}, not {want}"
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1000.0) > 1e38);
    }

    #[test]
    fn activations_are_close() {
        for i in -1000..1000 {
            let x = f64::from(i) * 0.02;
            let want = x / (1.0 + (-x).exp());
            assert!((f64::from(silu(x as f32)) - want).abs() < 2e-6, "silu({x})");
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            let want = 0.5 * x * (1.0 + u.tanh());
            assert!(
                (f64::from(gelu_tanh(x as f32)) - want).abs() < 2e-6,
                "gelu({x})"
            );
        }
    }
}
