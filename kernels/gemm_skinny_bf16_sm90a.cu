#include "gemm_sm90a.cuh"

#define GEMM_SKINNY(NAME, BN, SLICES, STAGES, CLUSTER)                                          \
  using NAME##_shape = GemmShape<Weights::A, 1, BN, SLICES, STAGES, CLUSTER>;                   \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(NAME##_shape::THREADS, 1)                        \
      NAME(const __grid_constant__ GemmArgs args) {                                             \
    gemm<NAME##_shape>(args);                                                                   \
  }

GEMM_SKINNY(gemm_skinny_bf16_8, 8, 2, 6, 1)
GEMM_SKINNY(gemm_skinny_bf16_16, 16, 2, 5, 1)
GEMM_SKINNY(gemm_skinny_bf16_32, 32, 2, 4, 1)
GEMM_SKINNY(gemm_skinny_bf16_64, 64, 1, 6, 1)
GEMM_SKINNY(gemm_skinny_bf16_128, 128, 1, 4, 1)
