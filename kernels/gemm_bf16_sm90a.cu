// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias), many tokens.
//
// Tokens are rows of A. `a` is x, box [64 k, 128 tokens]; `b` is w, box [64 k, BN / CLUSTER outputs];
// `out` box [64 outputs, 64 tokens]. All bfloat16, 128-byte swizzle.
#include "gemm_sm90a.cuh"

#define GEMM(NAME, BN, STAGES, CLUSTER)                                                         \
  using NAME##_shape = GemmShape<Weights::B, 2, BN, 1, STAGES, CLUSTER>;                        \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(NAME##_shape::THREADS, 1)                        \
      NAME(const __grid_constant__ GemmArgs args) {                                             \
    gemm<NAME##_shape>(args);                                                                   \
  }

GEMM(gemm_bf16_128x256, 256, 4, 2)
GEMM(gemm_bf16_128x192, 192, 4, 2)
GEMM(gemm_bf16_128x128, 128, 5, 2)
