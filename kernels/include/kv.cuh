// Where keys and values lie in the paged cache.
//
// cache  [layers][blocks][2][kv_heads] tiles: in a layer's block first all keys, then all values. A tile is a
//        head's share of a block, its positions one after another:
//          KV_BF16  bf16 [block_size][head_dim]
//          others   codes of 8 bits [block_size][head_dim], see kv_packed.cuh, then their scales,
//                   bf16 [block_size][scales]: one for each 16 elements of a row, or one for the row
// A token's place is given as `block * block_size + offset`. Sizes and places in tiles are in bytes.
#pragma once
#include <cstdint>

enum KvFormat : uint32_t { KV_BF16, KV_INT8, KV_FP8 };

struct KvShape {
  uint32_t blocks;
  uint32_t kv_heads;
  uint32_t block_size;
  uint32_t head_dim;
  uint32_t row_bytes;  // of a position's key (or value) in a head, its scales included
  KvFormat format;

  // A head's keys (or values) in one block.
  __device__ __forceinline__ size_t tile() const { return size_t(block_size) * row_bytes; }

  // One block in one layer.
  __device__ __forceinline__ size_t block() const { return 2 * kv_heads * tile(); }

  __device__ __forceinline__ size_t layer() const { return blocks * block(); }

  // Where a head's keys begin in a block of a layer.
  __device__ __forceinline__ size_t key_tile(uint32_t layer_index, uint32_t block_index, uint32_t head) const {
    return layer_index * layer() + block_index * block() + head * tile();
  }

  // From a head's keys in a block to its values there.
  __device__ __forceinline__ size_t key_to_value() const { return kv_heads * tile(); }

  // How many scales a row of codes has.
  __device__ __forceinline__ uint32_t scales() const { return (row_bytes - head_dim) / 2; }
};
