// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias) for many tokens: see gemm_sm90a.cuh.
//
// Tokens are the rows of A, 128 per block; pairs of blocks share their weights.
//
// args.a    x, box [128 tokens, 64 k]
// args.b    w, box [BN / 2 outputs, 64 k]
// args.out  bf16, box [64 tokens, 64 outputs] (224: [64, 32] with the 64-byte swizzle)
//           or out_f32, row-major
// bias      f32 or null
// k is a multiple of 8; for bf16 output so is `outputs`. Tensor maps have the 128-byte swizzle.
//
// Launch: an even number of blocks, at most 2 ceil(tokens / 256) ceil(outputs / BN): fewer leave SMs to
// others. GemmShape says how many threads and how much shared memory.
// Roofline: 2 tokens outputs k operations.
#include "gemm_sm90a.cuh"

#define GEMM(NAME, WARPGROUPS, BN, STAGES, CLUSTER)                                            \
  using NAME##_shape = GemmShape<Weights::B, WARPGROUPS, BN, 1, STAGES, CLUSTER>;              \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)                                   \
      __launch_bounds__(NAME##_shape::THREADS, 1) NAME(const __grid_constant__ GemmArgs args) { \
    gemm<NAME##_shape>(args);                                                                  \
  }

GEMM(gemm_bf16_64x160, 1, 160, 6, 1)
GEMM(gemm_bf16_64x192, 1, 192, 6, 1)
GEMM(gemm_bf16_64x192_c2, 1, 192, 6, 2)
GEMM(gemm_bf16_64x256, 1, 256, 5, 1)
GEMM(gemm_bf16_128x96, 2, 96, 7, 2)
GEMM(gemm_bf16_128x96_c1, 2, 96, 7, 1)
GEMM(gemm_bf16_128x128, 2, 128, 6, 2)
GEMM(gemm_bf16_128x128_c1, 2, 128, 6, 1)
GEMM(gemm_bf16_128x144_c1, 2, 144, 5, 1)
GEMM(gemm_bf16_128x160_c1, 2, 160, 5, 1)
GEMM(gemm_bf16_128x192, 2, 192, 4, 2)
GEMM(gemm_bf16_128x192_c1, 2, 192, 4, 1)
GEMM(gemm_bf16_128x224, 2, 224, 4, 2)
GEMM(gemm_bf16_128x224_c1, 2, 224, 4, 1)
GEMM(gemm_bf16_128x240_c1, 2, 240, 4, 1)
GEMM(gemm_bf16_128x256, 2, 256, 4, 2)
GEMM(gemm_bf16_128x256_c1, 2, 256, 4, 1)
