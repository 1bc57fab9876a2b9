// Residual addition and RMS norm (Zhang & Sennrich 2019):
//   residual[t] += delta[t] (if there is a delta);  out[t] = residual[t] / rms(residual[t]) * norm,
//   rms(x) = sqrt(mean(x^2) + eps).
// A delta with a norm of its own is normalised in the same way before it is added. The norm is taken of the float32 sum, before it is rounded for the residual stream.
//
// delta, residual, out  bf16 [n, width];  delta_norm, norm  f32 [width];  delta and delta_norm may be null
//
// Launch: one block per token, which keeps its row in registers: ceil(width / 8) vectors over
// blockDim.x threads, at most MAX_TURNS each. Roofline: 8 * width bytes per token.
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr int MAX_TURNS = 4;

__device__ __forceinline__ float sum_of_squares(const Vec8& v) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < VEC; j++) sum += v.x[j] * v.x[j];
  return sum;
}

extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const bf16* __restrict__ delta, const float* __restrict__ delta_norm, bf16* __restrict__ residual,
                 const float* __restrict__ norm, float eps, int width, bf16* __restrict__ out) {
  __shared__ float scratch[WARP];
  let_next_start();
  wait_for_previous();
  const size_t row = size_t(blockIdx.x) * width;
  const auto at = [&](int turn) { return (turn * int(blockDim.x) + int(threadIdx.x)) * VEC; };
  const auto scale_of = [&](float squares) { return rsqrtf(reduce_block(squares, Sum{}, scratch) / width + eps); };

  float delta_scale = 1.f;
  if (delta_norm) {
    float squares = 0.f;
    for (int turn = 0; turn < MAX_TURNS; turn++) {
      if (at(turn) < width) squares += sum_of_squares(load8(delta + row + at(turn)));
    }
    delta_scale = scale_of(squares);
  }
  Vec8 x[MAX_TURNS];
  float squares = 0.f;
#pragma unroll
  for (int turn = 0; turn < MAX_TURNS; turn++) {
    const int i = at(turn);
    if (i >= width) continue;
    x[turn] = load8(residual + row + i);
    if (delta) {
      Vec8 d = load8(delta + row + i);
      if (delta_norm) {
        const Vec8 w = load8(delta_norm + i);
#pragma unroll
        for (int j = 0; j < VEC; j++) d.x[j] *= delta_scale * w.x[j];
      }
#pragma unroll
      for (int j = 0; j < VEC; j++) x[turn].x[j] += d.x[j];
      store8(residual + row + i, x[turn]);
    }
    squares += sum_of_squares(x[turn]);
  }
  const float scale = scale_of(squares);
#pragma unroll
  for (int turn = 0; turn < MAX_TURNS; turn++) {
    const int i = at(turn);
    if (i >= width) continue;
    const Vec8 w = load8(norm + i);
#pragma unroll
    for (int j = 0; j < VEC; j++) x[turn].x[j] *= scale * w.x[j];
    store8(out + row + i, x[turn]);
  }
}
