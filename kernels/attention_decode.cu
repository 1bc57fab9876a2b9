// Attention of one new token per sequence over the paged KV cache, on any GPU since Ampere.
//
// Types and layouts: attention.cuh, kv.cuh. The positions of a sequence are cut into splits of fixed
// size, which different blocks work on; the last of them to end merges the partial results in the order
// of positions. In a block, warp w has the tiles of 16 positions with tile % WARPS == w; the query
// heads of a key/value head are the 16 rows of an mma. So a sequence's result depends on its own
// length and window alone, not on the batch, the grid or where its blocks lie.
//
// work: every split that a sequence's query sees; no two sequences share one. split is a multiple of 16 * WARPS, at
// most 32 * 16 * WARPS.
//
// Launch: any number of blocks, at best as many as fit on the SMs; 32 * WARPS threads; SHARED_BYTES.
// Each warp streams its tiles through a ring of its own, so nothing in the loop waits for another warp.
// Codes of 8 bits (kv_packed.cuh) become bfloat16 in shared memory before they are used.
// Roofline: 2 * row_bytes per position and key/value head.
#include "attention_mma.cuh"
#include "kv_packed.cuh"
#include "ptx.cuh"

constexpr int TILE = 16, STAGES = 3;

template <int HD, bool PACKED>
struct Decode {
  static constexpr int WARPS = HD > 128 ? 2 : 4, THREADS = 32 * WARPS;
  static constexpr int TILE_BYTES = TILE * HD * 2;
  // What a ring holds of a tile's keys or values: codes have at most one scale per 16 elements.
  static constexpr int RING_TILE = PACKED ? TILE * (HD + HD / 8) : TILE_BYTES, STAGE = 2 * RING_TILE;
  static constexpr int UNPACKED = PACKED ? 2 * TILE_BYTES : 0;
  static constexpr int SHARED_BYTES = WARPS * (STAGES * STAGE + UNPACKED);
  using Tile = Rows<HD>;

  const AttentionArgs& args;
  const uint32_t split;
  uint8_t* const shared;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The work in hand.
  Sharer sharer;
  uint32_t kv_head, first_row, rows;  // rows: query heads, at most 16 of the group
  uint32_t length, seen_from;         // the query sees positions seen_from .. length
  uint32_t tile, tiles;               // this warp's first tile, and how many it has, WARPS apart
  uint32_t block_ids;                 // lane i: block of this warp's tile i

  uint32_t q[HD / 16][4];
  float out[HD / 8][4];

  __device__ __forceinline__ Decode(const AttentionArgs& args, uint32_t split, uint8_t* shared)
      : args(args), split(split), shared(shared) {}

  __device__ __forceinline__ uint32_t row_tiles() const { return divide_up(args.group, 16); }

  __device__ __forceinline__ uint32_t stage(uint32_t i) const {
    return warp * (STAGES * STAGE + UNPACKED) + i % STAGES * STAGE;
  }

  __device__ __forceinline__ void run() {
    const uint32_t heads = args.shape.kv_heads * row_tiles(), count = *args.works * heads;
    for (uint32_t index = blockIdx.x; index < count; index += gridDim.x) {
      const uint32_t at = index / heads, head = index % heads;
      const Work work = args.work[at];
      sharer = args.sharers[work.token];
      kv_head = head / row_tiles();
      first_row = head % row_tiles() * 16;
      rows = min(args.group - first_row, 16u);
      length = work.position + 1;
      seen_from = first_seen(args, work.position);
      const uint32_t begin = max(work.part * split, seen_from), end = min((work.part + 1) * split, length);
      find_tiles(begin / TILE, divide_up(end, TILE), work.table);
      load_queries(sharer.token);
      const Weights weights = accumulate(end);
      finish(work.part, head, weights);
    }
  }

  __device__ __forceinline__ void find_tiles(uint32_t first, uint32_t last, uint32_t table) {
    tile = first + (warp + WARPS - first % WARPS) % WARPS;
    tiles = tile < last ? divide_up(last - tile, WARPS) : 0;
    const uint32_t mine = tile + lane * WARPS;
    if (mine < last) block_ids = args.tables[table + mine * TILE / args.shape.block_size];
  }

  // As the A operand: rows are heads, columns elements.
  __device__ __forceinline__ void load_queries(uint32_t token) {
    const uint32_t head = kv_head * args.group + first_row;
    const bf16* from = args.q + size_t(token) * args.q_stride + head * HD + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t row = lane / 4 + i % 2 * 8, column = k * 16 + i / 2 * 8;
        q[k][i] = row < rows ? *reinterpret_cast<const uint32_t*>(from + row * HD + column) : 0;
      }
    }
  }

  // Starts the copy of the warp's tile i; an empty group keeps the count when there is none.
  __device__ __forceinline__ void load(uint32_t i, uint32_t end) {
    const uint32_t block = __shfl_sync(0xffffffffu, block_ids, i % 32);
    if (i < tiles) {
      const uint32_t position = (tile + i * WARPS) * TILE;
      const uint8_t* keys = args.cache + args.shape.key_tile(args.layer, block, kv_head);
      const uint32_t row = position % args.shape.block_size;
      const uint32_t to = shared_window(shared) + stage(i);
      load_rows(to, keys, row, end - position);
      load_rows(to + RING_TILE, keys + args.shape.key_to_value(), row, end - position);
    }
    copy_async_commit();
  }

  // What lies behind the end is another sequence's: even a weight of 0 would not silence a NaN.
  __device__ __forceinline__ void load_rows(uint32_t to, const uint8_t* from, uint32_t row, uint32_t valid) const {
    if constexpr (!PACKED) {
      Tile::copy16(to, reinterpret_cast<const bf16*>(from) + size_t(row) * HD, valid);
    } else {
      const uint8_t* codes = from + row * HD;
#pragma unroll
      for (uint32_t i = lane; i < TILE * HD / 16; i += 32) copy_async(to + i * 16, codes + i * 16, true);
      const uint32_t scales_row = 2 * args.shape.scales();
      const uint8_t* scales = from + args.shape.block_size * HD + row * scales_row;
      if (lane < scales_row) copy_async(to + TILE * HD + lane * 16, scales + lane * 16, true);
    }
  }

  // Makes rows of bfloat16 of a tile's codes; of those from `valid` on, zeros.
  __device__ __forceinline__ void unpack_rows(uint8_t* to, const uint8_t* from, uint32_t valid) const {
    constexpr uint32_t PIECES = HD / 16;
    const uint32_t scales_row = args.shape.scales();
    const bf16* scales = reinterpret_cast<const bf16*>(from + TILE * HD);
#pragma unroll
    for (uint32_t i = lane; i < TILE * PIECES; i += 32) {
      const uint32_t row = i / PIECES, piece = i % PIECES;
      const bf16 scale = row < valid ? scales[scales_row > 1 ? i : row] : bf16{0};
      uint4 low, high;
      unpack16(reinterpret_cast<const uint4*>(from)[i], scale, args.shape.format, low, high);
      *reinterpret_cast<uint4*>(to + Tile::place(row, 2 * piece)) = low;
      *reinterpret_cast<uint4*>(to + Tile::place(row, 2 * piece + 1)) = high;
    }
  }

  __device__ __forceinline__ Weights accumulate(uint32_t end) {
    Weights weights;
#pragma unroll
    for (int j = 0; j < HD / 8; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.f;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i, end);
    for (uint32_t i = 0; i < tiles; i++) {
      copy_async_wait<STAGES - 2>();
      __syncwarp();
      load(i + STAGES - 1, end);
      const uint32_t position = (tile + i * WARPS) * TILE;
      uint32_t keys = stage(i);
      if constexpr (PACKED) {
        const uint8_t* ring = shared + keys;
        keys = warp * (STAGES * STAGE + UNPACKED) + STAGES * STAGE;
        unpack_rows(shared + keys, ring, end - position);
        unpack_rows(shared + keys + TILE_BYTES, ring + RING_TILE, end - position);
        __syncwarp();
      }
      attend(weights, shared_window(shared) + keys, position);
    }
    copy_async_wait<0>();
    return weights;
  }

  __device__ __forceinline__ void attend(Weights& weights, uint32_t keys, uint32_t position) {
    float scores[2][4] = {};
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
      uint32_t b[4];
      load_matrices(b, keys + Tile::columns_first(0, k * 16));
      mma_bf16(scores[0], q[k], b[0], b[1]);
      mma_bf16(scores[1], q[k], b[2], b[3]);
    }
    float(&flat)[8] = reinterpret_cast<float(&)[8]>(scores);
    if (args.cap_out != 0.f) cap_scores(flat, args);
    const uint32_t own[2] = {length - 1, length - 1};
    if (position < seen_from || position + TILE > length) hide_unseen(flat, args, position, own, lane % 4 * 2);
    float change[2];
    weights.add(flat, args.scale, change);
    const uint32_t p[4] = {pack_bf16(flat[0], flat[1]), pack_bf16(flat[2], flat[3]), pack_bf16(flat[4], flat[5]),
                           pack_bf16(flat[6], flat[7])};
    const uint32_t values = keys + TILE_BYTES;
#pragma unroll
    for (int j = 0; j < HD / 16; j++) {
      uint32_t b[4];
      load_matrices_transposed(b, values + Tile::rows_first(0, j * 16));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float(&o)[4] = out[2 * j + half];
        o[0] *= change[0], o[1] *= change[0], o[2] *= change[1], o[3] *= change[1];
        mma_bf16(o, p, b[2 * half], b[2 * half + 1]);
      }
    }
  }

  // Adds up the warps, in order, and hands the result on: to the output if there is no other split.
  __device__ __forceinline__ void finish(uint32_t part, uint32_t head, const Weights& weights) {
    __shared__ float2 sums[WARPS][16];
    __shared__ bool last;
    float(*outs)[16][HD] = reinterpret_cast<float(*)[16][HD]>(shared);
    __syncthreads();  // the rings are free
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint32_t r = lane / 4 + row * 8;
      const float2 sum = weights.row(row, args.scale);
      if (lane % 4 == 0) sums[warp][r] = sum;
#pragma unroll
      for (int j = 0; j < HD / 8; j++) {
        *reinterpret_cast<float2*>(&outs[warp][r][j * 8 + lane % 4 * 2]) =
            make_float2(out[j][2 * row], out[j][2 * row + 1]);
      }
    }
    __syncthreads();
    const uint32_t first_part = seen_from / split, parts = divide_up(length, split) - first_part;
    const uint32_t heads = args.shape.kv_heads * row_tiles();
    // Slots of one sequence and key/value head: `kv_heads` apart from split to split.
    const size_t first_slot = size_t(sharer.slot) * args.shape.kv_heads + kv_head;
    const size_t slot = first_slot + size_t(part - first_part) * args.shape.kv_heads;
    bf16* to = args.out + (size_t(sharer.token) * args.shape.kv_heads + kv_head) * args.group * HD;
    for (uint32_t i = threadIdx.x; i < rows * (HD / 4); i += THREADS) {
      const uint32_t row = i / (HD / 4), column = i % (HD / 4) * 4;
      float2 total = make_float2(-infinity(), 0.f);
      float sum[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float before, after;
        merge(total, sums[w][row], before, after);
        const float4 x = *reinterpret_cast<const float4*>(&outs[w][row][column]);
        sum[0] = merged(sum[0], x.x, before, after);
        sum[1] = merged(sum[1], x.y, before, after);
        sum[2] = merged(sum[2], x.z, before, after);
        sum[3] = merged(sum[3], x.w, before, after);
      }
      const uint32_t r = first_row + row;
      if (parts == 1) {
        const float inverse = 1.f / total.y;
        *reinterpret_cast<uint2*>(to + size_t(r) * HD + column) = make_uint2(
            pack_bf16(sum[0] * inverse, sum[1] * inverse), pack_bf16(sum[2] * inverse, sum[3] * inverse));
      } else {
        const size_t row_slot = slot * args.group + r;
        *reinterpret_cast<float4*>(args.partial_out + row_slot * HD + column) =
            make_float4(sum[0], sum[1], sum[2], sum[3]);
        if (column == 0) args.partial_sum[row_slot] = total;
      }
    }
    if (parts > 1) {
      __threadfence();
      __syncthreads();
      const size_t counter = size_t(sharer.slot) * heads + head;
      if (threadIdx.x == 0) last = atomicAdd(args.counters + counter, 1) == parts - 1;
      __syncthreads();
      if (last) {
        __threadfence();
        merge_rows(first_slot, parts, to);
        if (threadIdx.x == 0) args.counters[counter] = 0;
      }
    }
    __syncthreads();  // before the next work's copies
  }

  __device__ __forceinline__ void merge_rows(size_t first_slot, uint32_t parts, bf16* to) {
    merge_parts<HD>(args, first_slot, args.shape.kv_heads, parts, first_row, rows, to, threadIdx.x, THREADS);
  }
};

template <int HD, bool PACKED>
__device__ __forceinline__ void decode(const AttentionArgs& args, uint32_t split) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  let_next_start();
  wait_for_previous();
  Decode<HD, PACKED>(args, split, dynamic_shared).run();
}

#define DECODE(name, head_dim, packed)                                                                       \
  extern "C" __global__ void __launch_bounds__(Decode<head_dim, packed>::THREADS)                            \
      attention_decode_##name(const __grid_constant__ AttentionArgs args, uint32_t split) {                  \
    decode<head_dim, packed>(args, split);                                                                   \
  }

DECODE(64, 64, false)
DECODE(96, 96, false)
DECODE(128, 128, false)
DECODE(256, 256, false)
DECODE(packed_64, 64, true)
DECODE(packed_96, 96, true)
DECODE(packed_128, 128, true)
DECODE(packed_256, 256, true)
