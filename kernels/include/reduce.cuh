// Reductions whose order is fixed by the number of threads alone, so that a row's value has the same
// bits whatever else runs.
#pragma once
#include <cstdint>

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
  template <typename T>
  __device__ __forceinline__ static T identity() {
    return T(0);
  }
};

// Of unsigned numbers or of floats.
struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
  template <typename T>
  __device__ __forceinline__ static T identity() {
    if constexpr (T(-1) < T(0)) return -INFINITY;
    else return T(0);
  }
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

// Each lane gets the sum of its own value and those of all lanes before it.
template <typename T>
__device__ __forceinline__ T prefix_sum_lanes(T value) {
  for (int distance = 1; distance < WARP; distance *= 2) {
    const T before = __shfl_up_sync(ALL_LANES, value, distance);
    if (threadIdx.x % WARP >= distance) value += before;
  }
  return value;
}

// Over a block of whole warps; every thread gets the result. `scratch` has room for WARP values and
// may be used again at once.
template <typename Op, typename T>
__device__ __forceinline__ T reduce_block(T value, Op op, T* scratch) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  value = reduce_lanes(value, op);
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return reduce_lanes(lane < warps ? scratch[lane] : Op::template identity<T>(), op);
}
