// Residual addition and RMS norm (Zhang & Sennrich 2019):
//   residual[t] += delta[t] (if there is a delta);  out[t] = residual[t] / rms(residual[t]) * norm,
//   rms(x) = sqrt(mean(x^2) + eps).
// A delta with a norm of its own is normalised in the same way before it is added. The norm is taken of the float32 sum, before it is rounded for the residual stream.
//
// delta, residual, out  bf16 [n, width];  delta_norm, norm  f32 [width];  delta and delta_norm may be null
//
// Launch: one block per token, which keeps its row in registers: ceil(width / 8) vectors over blockDim.x
// threads, at most two or four each. The norm is fetched before the kernel ahead has ended.
// Roofline: 8 * width bytes per token.
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

__device__ __forceinline__ float sum_of_squares(const Vec8& v) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < VEC; j++) sum += v.x[j] * v.x[j];
  return sum;
}

// TURNS: vectors of a thread, each a whole block's width after the one before.
template <int TURNS>
__device__ __forceinline__ void add_rms_norm(const bf16* __restrict__ delta, const float* __restrict__ delta_norm,
                                             bf16* __restrict__ residual, const float* __restrict__ norm, float eps,
                                             int width, bf16* __restrict__ out) {
  constexpr bool EARLY = TURNS <= 2;  // more weights would not fit into registers
  __shared__ float scratch[WARP];
  let_next_start();
  const size_t row = size_t(blockIdx.x) * width;
  const auto at = [&](int turn) { return (turn * int(blockDim.x) + int(threadIdx.x)) * VEC; };
  const auto scale_of = [&](float squares) { return rsqrtf(reduce_block(squares, Sum{}, scratch) / width + eps); };

  Vec8 weight[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    if (EARLY && at(turn) < width) weight[turn] = load8(norm + at(turn));
  }
  wait_for_previous();
  uint4 raw[TURNS], raw_delta[TURNS];  // all loads before the first use
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    if (at(turn) >= width) continue;
    raw[turn] = *reinterpret_cast<const uint4*>(residual + row + at(turn));
    if (delta) raw_delta[turn] = *reinterpret_cast<const uint4*>(delta + row + at(turn));
  }
  float delta_scale = 1.f;
  if (delta_norm) {
    float squares = 0.f;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      if (at(turn) < width) squares += sum_of_squares(unpack(raw_delta[turn]));
    }
    delta_scale = scale_of(squares);
  }
  Vec8 x[TURNS];
  float squares = 0.f;
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    if (at(turn) >= width) continue;
    x[turn] = unpack(raw[turn]);
    if (delta) {
      Vec8 d = unpack(raw_delta[turn]);
      if (delta_norm) {
        const Vec8 w = load8(delta_norm + at(turn));
#pragma unroll
        for (int j = 0; j < VEC; j++) d.x[j] *= delta_scale * w.x[j];
      }
#pragma unroll
      for (int j = 0; j < VEC; j++) x[turn].x[j] += d.x[j];
      store8(residual + row + at(turn), x[turn]);
    }
    squares += sum_of_squares(x[turn]);
  }
  const float scale = scale_of(squares);
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    if (at(turn) >= width) continue;
    const Vec8 w = EARLY ? weight[turn] : load8(norm + at(turn));
#pragma unroll
    for (int j = 0; j < VEC; j++) x[turn].x[j] *= scale * w.x[j];
    store8(out + row + at(turn), x[turn]);
  }
}

#define ADD_RMS_NORM(turns)                                                                                       \
  extern "C" __global__ void __launch_bounds__(1024)                                                              \
      add_rms_norm_##turns(const bf16* __restrict__ delta, const float* __restrict__ delta_norm,                  \
                           bf16* __restrict__ residual, const float* __restrict__ norm, float eps, int width,     \
                           bf16* __restrict__ out) {                                                              \
    add_rms_norm<turns>(delta, delta_norm, residual, norm, eps, width, out);                                      \
  }

ADD_RMS_NORM(2)
ADD_RMS_NORM(4)
