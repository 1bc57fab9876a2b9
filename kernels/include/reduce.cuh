// Reductions whose order is fixed by the number of threads alone, so that a row's value has the same
// bits whatever else runs.
#pragma once
#include <cstdint>

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Over groups of `lanes` neighbouring lanes (a power of two); every lane gets the result. All lanes
// of the warp take part.
template <typename Op, typename T>
__device__ __forceinline__ T reduce_lanes(T value, Op op, int lanes = WARP) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(ALL_LANES, value, distance));
  }
  return value;
}

// Over a block of whole warps; every thread gets the result. `scratch` has room for one value per
// warp and may be used again at once: both ends are barriers.
template <typename Op, typename T>
__device__ __forceinline__ T reduce_block(T value, Op op, T* scratch) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  value = reduce_lanes(value, op);
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[warp] = value;
  __syncthreads();
  T total = scratch[0];
  for (int i = 1; i < warps; i++) total = op(total, scratch[i]);
  return total;
}
