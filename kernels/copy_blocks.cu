// Copies whole KV blocks, in every layer: copy-on-write of shared prefixes.
//
// pairs  uint2 [n] (from, to);  cache  [layers][blocks][block_bytes]
//
// Launch: grid (slices, n, layers): `slices` blocks share a copy. block_bytes is a multiple of 16, and no
// block is both read and written. Roofline: 2 * block_bytes per layer and copy.
#include "ptx.cuh"
#include "types.cuh"

extern "C" __global__ void copy_blocks(const uint2* __restrict__ pairs, uint4* __restrict__ cache,
                                       uint32_t blocks, uint32_t block_bytes) {
  let_next_start();
  wait_for_previous();
  const uint32_t vectors = block_bytes / sizeof(uint4);
  const uint2 pair = pairs[blockIdx.y];
  uint4* layer = cache + size_t(blockIdx.z) * blocks * vectors;
  const uint4* from = layer + size_t(pair.x) * vectors;
  uint4* to = layer + size_t(pair.y) * vectors;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
    to[i] = load_once(from + i);
  }
}
