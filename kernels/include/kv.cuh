// Where keys and values lie in the paged cache.
//
// cache  [layers][blocks][2][kv_heads][block_size][head_dim]: in a layer's block first all keys, then
// all values; a head's positions lie one after another, so a head's share of a block is one
// contiguous tile. A token's place is given as `block * block_size + offset`.
#pragma once
#include <cstdint>

struct KvShape {
  uint32_t blocks;
  uint32_t kv_heads;
  uint32_t block_size;
  uint32_t head_dim;

  // Elements of a head's keys (or values) in one block.
  __device__ __forceinline__ size_t tile() const { return size_t(block_size) * head_dim; }

  // Elements of one block in one layer.
  __device__ __forceinline__ size_t block() const { return 2 * kv_heads * tile(); }

  __device__ __forceinline__ size_t layer() const { return blocks * block(); }

  // First element of a head's keys in a block of a layer.
  __device__ __forceinline__ size_t key_tile(uint32_t layer_index, uint32_t block_index, uint32_t head) const {
    return layer_index * layer() + block_index * block() + head * tile();
  }

  // From a head's keys in a block to its values there.
  __device__ __forceinline__ size_t key_to_value() const { return kv_heads * tile(); }
};
