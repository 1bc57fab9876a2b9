// Writes single words: to[index] = value, for block tables that grew.
//
// words  uint2 [n] (index, value), no index twice;  to  u32
//
// Launch: a grid that covers n.
#include "ptx.cuh"
#include "types.cuh"

extern "C" __global__ void scatter(const uint2* __restrict__ words, uint32_t n, uint32_t* __restrict__ to) {
  let_next_start();
  wait_for_previous();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[words[i].x] = words[i].y;
}
