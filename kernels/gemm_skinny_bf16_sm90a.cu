// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias) for few tokens: see gemm_sm90a.cuh.
//
// Weights are the rows of A, 64 or 128 per block: they fill the side of wgmma that can't be narrow, and the
// blocks that share them run at the same time, so that they are read once. A ring of about 200 KB per SM
// keeps 13 to 26 MB on their way: also the 64 blocks of a 4096-wide product use the whole bandwidth, without a
// split along k. For hundreds of tokens, which BN divides better than the 256 of a pair of blocks in
// gemm_bf16_sm90a.cu, there are tiles that leave few SMs without work.
//
// args.a    w, box [64 WARPGROUPS outputs, 64 k]
// args.b    x, box [BN tokens, 64 k]
//           Boxes are no larger than the matrix.
// args.out  bf16, box [tokens of GemmShape::BOX_TOKENS, 64 outputs] (with gates 32, with the 64-byte
//           swizzle), or out_f32, row-major
// bias      f32 or null
// k is a multiple of 8; for bf16 output so is its width. Tensor maps have the 128-byte swizzle.
//
// Launch: any number of blocks up to ceil(outputs / 64 WARPGROUPS) ceil(tokens / BN).
// Roofline: 2 outputs k bytes, 2 tokens outputs k operations.
#include "gemm_sm90a.cuh"

#define GEMM(NAME, WARPGROUPS, BN, SLICES, STAGES)                                            \
  using NAME##_shape = GemmShape<Weights::A, WARPGROUPS, BN, SLICES, STAGES, 1>;              \
  extern "C" __global__ void __launch_bounds__(NAME##_shape::THREADS, 1)                      \
      NAME(const __grid_constant__ GemmArgs args) {                                           \
    gemm<NAME##_shape>(args);                                                                  \
  }

GEMM(gemm_skinny_bf16_64x8, 1, 8, 2, 11)
GEMM(gemm_skinny_bf16_64x16, 1, 16, 2, 10)
GEMM(gemm_skinny_bf16_64x32, 1, 32, 2, 8)
GEMM(gemm_skinny_bf16_64x64, 1, 64, 2, 6)
GEMM(gemm_skinny_bf16_64x96, 1, 96, 1, 10)
GEMM(gemm_skinny_bf16_64x128, 1, 128, 1, 8)
GEMM(gemm_skinny_bf16_64x160, 1, 160, 1, 7)
GEMM(gemm_skinny_bf16_64x192, 1, 192, 1, 6)
GEMM(gemm_skinny_bf16_64x256, 1, 256, 1, 5)
GEMM(gemm_skinny_bf16_128x128, 2, 128, 1, 6)
GEMM(gemm_skinny_bf16_128x144, 2, 144, 1, 6)
GEMM(gemm_skinny_bf16_128x160, 2, 160, 1, 5)
GEMM(gemm_skinny_bf16_128x192, 2, 192, 1, 5)
