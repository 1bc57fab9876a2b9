// Residual addition and RMS norm (Zhang & Sennrich 2019):
//   residual[t] += delta[t] (if there is a delta);  out[t] = residual[t] / rms(residual[t]) * norm,
//   rms(x) = sqrt(mean(x^2) + eps).
// The norm is taken of the float32 sum, before it is rounded for the residual stream.
//
// delta, residual, out  bf16 [n, width];  norm  f32 [width];  delta may be null
//
// Launch: one block per token, which keeps its row in registers: ceil(width / 8) vectors over
// blockDim.x threads, at most MAX_TURNS each. Roofline: 8 * width bytes per token.
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr int MAX_TURNS = 4;

extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const bf16* __restrict__ delta, bf16* __restrict__ residual, const float* __restrict__ norm,
                 float eps, int width, bf16* __restrict__ out) {
  __shared__ float scratch[WARP];
  let_next_start();
  wait_for_previous();
  const size_t row = size_t(blockIdx.x) * width;
  Vec8 x[MAX_TURNS];
  float squares = 0.f;
#pragma unroll
  for (int turn = 0; turn < MAX_TURNS; turn++) {
    const int i = (turn * blockDim.x + threadIdx.x) * VEC;
    if (i >= width) continue;
    x[turn] = load8(residual + row + i);
    if (delta) {
      const Vec8 d = load8(delta + row + i);
#pragma unroll
      for (int j = 0; j < VEC; j++) x[turn].x[j] += d.x[j];
      store8(residual + row + i, x[turn]);
    }
#pragma unroll
    for (int j = 0; j < VEC; j++) squares += x[turn].x[j] * x[turn].x[j];
  }
  const float scale = rsqrtf(reduce_block(squares, Sum{}, scratch) / width + eps);
#pragma unroll
  for (int turn = 0; turn < MAX_TURNS; turn++) {
    const int i = (turn * blockDim.x + threadIdx.x) * VEC;
    if (i >= width) continue;
    const Vec8 w = load8(norm + i);
#pragma unroll
    for (int j = 0; j < VEC; j++) x[turn].x[j] *= scale * w.x[j];
    store8(out + row + i, x[turn]);
  }
}
