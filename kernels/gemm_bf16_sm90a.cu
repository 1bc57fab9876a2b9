// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias) for many tokens: see gemm_sm90a.cuh.
//
// Tokens are the rows of A, 128 per block; pairs of blocks share their weights.
//
// args.a    x, box [128 tokens, 64 k], or as many tokens as there are
// args.b    w, box [BN / 2 outputs, 64 k]
// args.out  bf16, box [64 tokens, 64 outputs], or 32 or 16 outputs where more don't divide BN (with gates
//           BN / 2), with a swizzle as wide as the box; or out_f32, row-major
// bias      f32 or null
// k is a multiple of 8; for bf16 output so is its width. Tensor maps have the 128-byte swizzle.
//
// Launch: an even number of blocks, at most 2 ceil(tokens / 256) ceil(outputs / BN): fewer leave SMs to
// others. GemmShape says how many threads and how much shared memory.
// Roofline: 2 tokens outputs k operations.
#include "gemm_sm90a.cuh"

#define GEMM(NAME, BN, STAGES)                                                                 \
  using NAME##_shape = GemmShape<Weights::B, 2, BN, 1, STAGES, 2>;                             \
  extern "C" __global__ void __cluster_dims__(2, 1, 1)                                         \
      __launch_bounds__(NAME##_shape::THREADS, 1) NAME(const __grid_constant__ GemmArgs args) { \
    gemm<NAME##_shape>(args);                                                                  \
  }

GEMM(gemm_bf16_128x192, 192, 5)
GEMM(gemm_bf16_128x224, 224, 4)
GEMM(gemm_bf16_128x256, 256, 4)
