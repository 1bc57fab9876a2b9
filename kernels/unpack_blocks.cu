// Keys and values of whole blocks, from codes of 8 bits to bfloat16: for attention of prompts, which reads them
// once per tile of queries.
//
// cache  codes, see kv.cuh and kv_packed.cuh;  blocks  u32 [n]
// out    the layout of a cache of one layer, n blocks and KV_BF16
//
// Launch: grid (n, slices): `slices` blocks of threads share a block of the cache.
// Roofline: 3 bytes per element and its scale.
#include "kv_packed.cuh"
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(256)
    unpack_blocks(const uint8_t* __restrict__ cache, const __grid_constant__ KvShape shape, uint32_t layer,
                  const uint32_t* __restrict__ blocks, uint4* __restrict__ out) {
  let_next_start();
  wait_for_previous();
  const uint32_t pieces = shape.head_dim / 16, tile_pieces = shape.block_size * pieces;
  const uint32_t tiles = 2 * shape.kv_heads, scales = shape.scales();
  const uint8_t* const from = cache + shape.key_tile(layer, blocks[blockIdx.x], 0);
  uint4* const to = out + size_t(blockIdx.x) * tiles * tile_pieces * 2;
  for (uint32_t i = blockIdx.y * blockDim.x + threadIdx.x; i < tiles * tile_pieces; i += gridDim.y * blockDim.x) {
    const uint32_t in_tile = i % tile_pieces;
    const uint8_t* const tile = from + i / tile_pieces * shape.tile();
    const bf16* const tile_scales = reinterpret_cast<const bf16*>(tile + shape.block_size * shape.head_dim);
    uint4 low, high;
    unpack16(load_once(reinterpret_cast<const uint4*>(tile) + in_tile),
             tile_scales[scales > 1 ? in_tile : in_tile / pieces], shape.format, low, high);
    to[2 * i] = low;
    to[2 * i + 1] = high;
  }
}
