// The gate of a feed-forward block: out[t] = activation(gate[t]) * up[t].
// The products of gemm_sm90a.cuh do the same themselves, bit for bit.
//
// gate_up  bf16 [n, 2 * width], a row is gate, then up;  out  bf16 [n, width]
//
// Launch: a grid that strides over n * width / 8 vectors. Roofline: 6 * width bytes per token.
#include "activation.cuh"
#include "ptx.cuh"
#include "types.cuh"

template <float (*ACTIVATION)(float)>
__device__ __forceinline__ void act_mul(const bf16* gate_up, uint32_t n, uint32_t width, bf16* out) {
  let_next_start();
  wait_for_previous();
  const uint32_t vectors = width / VEC;
  const uint64_t total = uint64_t(n) * vectors;
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < total;
       i += uint64_t(gridDim.x) * blockDim.x) {
    const size_t token = i / vectors, at = i % vectors * VEC;
    const bf16* from = gate_up + token * 2 * width + at;
    const Vec8 gate = load8(from), up = load8(from + width);
    Vec8 v;
#pragma unroll
    for (int j = 0; j < VEC; j++) v.x[j] = ACTIVATION(gate.x[j]) * up.x[j];
    store8(out + token * width + at, v);
  }
}

extern "C" __global__ void act_mul_silu(const bf16* __restrict__ gate_up, uint32_t n, uint32_t width,
                                        bf16* __restrict__ out) {
  act_mul<silu>(gate_up, n, width, out);
}

extern "C" __global__ void act_mul_gelu(const bf16* __restrict__ gate_up, uint32_t n, uint32_t width,
                                        bf16* __restrict__ out) {
  act_mul<gelu_tanh>(gate_up, n, width, out);
}
