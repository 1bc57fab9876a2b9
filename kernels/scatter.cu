// Writes single words: to[index] = value, for block tables that grew.
//
// words  uint2 [n] (index, value), no index twice; NOWHERE as index is padding;  to  u32
//
// Launch: a grid that covers n.
#include "ptx.cuh"
#include "types.cuh"

constexpr uint32_t NOWHERE = 0xffffffffu;

extern "C" __global__ void scatter(const uint2* __restrict__ words, uint32_t n, uint32_t* __restrict__ to) {
  let_next_start();
  wait_for_previous();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n && words[i].x != NOWHERE) to[words[i].x] = words[i].y;
}
