// Causal attention over the paged KV cache on Hopper, of prompts and of single new tokens:
// FlashAttention 3 (Shah et al. 2024) with TMA and wgmma, in one arithmetic for both.
//
// Types and layouts: attention.cuh, kv.cuh. The query heads of a key/value head are packed: a tile is 64
// neighbouring query rows per consumer warpgroup. A row meets tiles of N positions, cut at multiples of N.
// Every SPLIT positions, cut at multiples of SPLIT, its softmax starts anew, and what came before is
// merged with the result: the same merge, in the same order, whether one block walks over all splits
// (prefill) or each split is a block's work and the last to end merges (decode). So a row's bits depend on
// its position, queries, keys, values and window alone: not on the batch, the grid, where blocks lie,
// how the prompt was cut into chunks, nor on whether the token was prompt or generated.
//
// cache  a tensor map of all keys and values: 64 elements, 8 rows, parts of 64 elements of a head, groups of 8
//        rows; a box is box_rows rows with the 128-byte swizzle; box_rows divides block_size and N and is a
//        multiple of 16
// work   those with the most positions first. prefill: the tiles of query rows of every sequence;
//        decode: every split that a sequence's query sees, or, read once, that several sequences' queries see,
//        up to 64 / group: their heads are rows of one tile
//
// Launch: any number of blocks, at best one per SM; THREADS; SHARED_BYTES. The first warpgroup loads: one
// warp keys and values, one warp per consumer its queries. Two consumers take turns on the tensor cores:
// while one computes its softmax, the other multiplies. Decoding may run beside prefill that was queued just
// before it, on SMs that this leaves: prefill lets it start once it has itself waited for what was before both, and
// decoding ends only when prefill has ended.
// Roofline: prefill 4 * head_dim operations per query row and position that it sees; decode 4 * head_dim
// bytes per position and key/value head.
#include "attention_sm90a.cuh"

#define ATTENTION(name, ...)                                                                                 \
  extern "C" __global__ void __launch_bounds__(Shape<__VA_ARGS__>::THREADS, 1)                               \
      attention_##name(const __grid_constant__ AttentionArgs args, const __grid_constant__ TensorMap cache, \
                       uint32_t box_rows) {                                                                  \
    attention<Shape<__VA_ARGS__>>(args, &cache, box_rows);                                                   \
  }

ATTENTION(prefill_64, 64, 128, 2, false)
ATTENTION(prefill_96, 96, 128, 2, false)
ATTENTION(prefill_128, 128, 128, 2, false)
ATTENTION(prefill_256, 256, 64, 1, false)
ATTENTION(decode_64, 64, 128, 1, true)
ATTENTION(decode_96, 96, 128, 1, true)
ATTENTION(decode_128, 128, 128, 1, true)
ATTENTION(decode_256, 256, 64, 1, true)

#define ATTENTION_PACKED(name, ...)                                                                          \
  extern "C" __global__ void __launch_bounds__(Shape<__VA_ARGS__>::THREADS, 1)                               \
      attention_##name(const __grid_constant__ AttentionArgs args) {                                         \
    attention<Shape<__VA_ARGS__>>(args, nullptr, 0);                                                         \
  }

ATTENTION_PACKED(decode_packed_64, 64, 128, 1, true, true)
ATTENTION_PACKED(decode_packed_96, 96, 128, 1, true, true)
ATTENTION_PACKED(decode_packed_128, 128, 128, 1, true, true)
ATTENTION_PACKED(decode_packed_256, 256, 64, 1, true, true)
