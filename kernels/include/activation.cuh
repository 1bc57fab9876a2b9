// The activations of gates. What a gate is multiplied with, and where its values come from, may differ
// between kernels; the arithmetic is this, so that their results are the same bits.
#pragma once

// 1 / (1 + e^(-x)), within a few units in the last place: its results are rounded to bfloat16.
__device__ __forceinline__ float sigmoid(float x) {
  float power, quotient;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, -1.4426950409f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1.f + power));
  return quotient;
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// The tanh approximation of GELU (Hendrycks & Gimpel 2016): x/2 (1 + tanh u) = x / (1 + e^(-2u))
__device__ __forceinline__ float gelu_tanh(float x) {
  const float cube = __fmul_rn(__fmul_rn(x, x), x);
  return x * sigmoid(__fmul_rn(1.5957691216f, __fmaf_rn(0.044715f, cube, x)));
}
