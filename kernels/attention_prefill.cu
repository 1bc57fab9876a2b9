// Causal attention of prompt tokens over the paged KV cache, which holds the past and the step's own
// keys and values, on any GPU since Ampere: FlashAttention 2 (Dao 2023) with mma.sync and cp.async.
//
// Types and layouts: attention.cuh, kv.cuh. The query heads of a key/value head are packed: a tile is
// ROWS neighbouring query rows. A row meets tiles of N positions, cut at multiples of N, from the first
// one it sees on. So its bits depend on its position, queries, keys, values and window alone, not on how
// the prompt was cut into chunks or what else is in the step.
//
// work: the tiles of query rows of every sequence, those with the most positions first.
//
// Launch: any number of blocks, at best as many as fit on the SMs; 128 threads; SHARED_BYTES.
// Roofline: 4 * head_dim operations per query row and position that it sees.
#include "attention_mma.cuh"
#include "ptx.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;

// MT: tiles of 16 query rows per warp.
template <int HD, int MT, int N>
struct Prefill {
  static constexpr int ROWS = WARPS * MT * 16;
  static constexpr int KEYS_AT = ROWS * HD * 2, VALUES_AT = KEYS_AT + N * HD * 2;
  static constexpr int SHARED_BYTES = VALUES_AT + N * HD * 2;
  using Tile = Rows<HD>;

  const AttentionArgs& args;
  const uint32_t shared;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The work in hand.
  Work work;
  uint32_t kv_head, first_row;
  uint32_t end;  // no row of the tile sees this position or a later one

  float out[MT][HD / 8][4];
  Weights weights[MT];

  __device__ __forceinline__ Prefill(const AttentionArgs& args, uint32_t shared) : args(args), shared(shared) {}

  __device__ __forceinline__ void run() {
    const uint32_t count = *args.works * args.shape.kv_heads;
    uint32_t index;
    for (uint32_t round = 0; round * gridDim.x < count; round++) {
      if (!next_work(round, count, gridDim.x, index)) continue;
      work = args.work[index / args.shape.kv_heads];
      kv_head = index % args.shape.kv_heads;
      first_row = work.part * ROWS;
      const uint32_t tokens = min(work.tokens, divide_up(first_row + ROWS, args.group));
      end = work.position + tokens;
      accumulate();
      store();
    }
  }

  // Position of a row of the tile; of rows behind the last token, what it would be.
  __device__ __forceinline__ uint32_t position(uint32_t row) const {
    return work.position + (first_row + row) / args.group;
  }

  __device__ __forceinline__ void accumulate() {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      weights[m] = Weights();
#pragma unroll
      for (int j = 0; j < HD / 8; j++) out[m][j][0] = out[m][j][1] = out[m][j][2] = out[m][j][3] = 0.f;
    }
    uint32_t start = first_seen(args, position(0)) / N * N;
    __syncthreads();  // the work before has been read
    load_queries();
    load(KEYS_AT, 0, start);
    for (; start < end; start += N) {
      copy_async_wait<0>();
      __syncthreads();  // keys are there, the values before have been read
      load(VALUES_AT, args.shape.key_to_value(), start);
      float scores[MT][N / 8][4] = {};
      score(scores);
      copy_async_wait<0>();
      __syncthreads();  // values are there, keys have been read
      if (start + N < end) load(KEYS_AT, 0, start + N);
      weigh(scores, start);
      add_values(scores);
    }
  }

  __device__ __forceinline__ void load_queries() {
    for (uint32_t i = threadIdx.x; i < ROWS * Tile::PIECES; i += THREADS) {
      const uint32_t row = i / Tile::PIECES, piece = i % Tile::PIECES;
      const uint32_t token = (first_row + row) / args.group, head = (first_row + row) % args.group;
      const bool valid = token < work.tokens;
      const size_t at = size_t(work.token + token) * args.q_stride + (kv_head * args.group + head) * HD;
      copy_async(shared + Tile::place(row, piece), args.q + (valid ? at + piece * VEC : 0), valid);
    }
  }

  // Starts the copy of N positions' keys, or values; zeros behind the end: what is in memory there is
  // another sequence's, and even a weight of 0 would not silence a NaN.
  __device__ __forceinline__ void load(uint32_t to, size_t from_keys, uint32_t start) {
#pragma unroll
    for (int slab = 0; slab < N / 16; slab += WARPS) {
      const uint32_t row = (slab + warp) * 16, position = start + row;
      if (N / 16 % WARPS != 0 && row >= N) continue;
      const uint32_t block_size = args.shape.block_size;
      const bool any = position < end;
      const uint32_t block = any ? args.tables[work.table + position / block_size] : 0;
      const uint8_t* keys = args.cache + args.shape.key_tile(args.layer, block, kv_head) + from_keys;
      const bf16* from = reinterpret_cast<const bf16*>(keys) + size_t(position % block_size) * HD;
      Tile::copy16(shared + to + row * Tile::BYTES, from, any ? end - position : 0);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void score(float (&scores)[MT][N / 8][4]) const {
#pragma unroll
    for (int k = 0; k < HD; k += 16) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) load_matrices(a[m], shared + Tile::rows_first((warp * MT + m) * 16, k));
#pragma unroll
      for (int n = 0; n < N / 16; n++) {
        uint32_t b[4];
        load_matrices(b, shared + KEYS_AT + Tile::columns_first(n * 16, k));
#pragma unroll
        for (int m = 0; m < MT; m++) {
          mma_bf16(scores[m][2 * n], a[m], b[0], b[1]);
          mma_bf16(scores[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Turns scores into weights, and scales what was summed before.
  __device__ __forceinline__ void weigh(float (&scores)[MT][N / 8][4], uint32_t start) {
    // Whether some row doesn't see some position of the tile.
    const bool partly = start + N > position(0) + 1 || start < first_seen(args, position(ROWS - 1));
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float(&flat)[N / 2] = reinterpret_cast<float(&)[N / 2]>(scores[m]);
      if (args.cap_out != 0.f) cap_scores(flat, args);
      if (partly) {
        const uint32_t row = (warp * MT + m) * 16 + lane / 4, own[2] = {position(row), position(row + 8)};
        hide_unseen(flat, args, start, own, lane % 4 * 2);
      }
      float change[2];
      weights[m].add(flat, args.scale, change);
#pragma unroll
      for (int j = 0; j < HD / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[m][j][i] *= change[i / 2];
      }
    }
  }

  __device__ __forceinline__ void add_values(float (&scores)[MT][N / 8][4]) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) {
        float(&low)[4] = scores[m][2 * k], (&high)[4] = scores[m][2 * k + 1];
        a[m][0] = pack_bf16(low[0], low[1]);
        a[m][1] = pack_bf16(low[2], low[3]);
        a[m][2] = pack_bf16(high[0], high[1]);
        a[m][3] = pack_bf16(high[2], high[3]);
      }
#pragma unroll
      for (int j = 0; j < HD / 16; j++) {
        uint32_t b[4];
        load_matrices_transposed(b, shared + VALUES_AT + Tile::rows_first(k * 16, j * 16));
#pragma unroll
        for (int m = 0; m < MT; m++) {
          mma_bf16(out[m][2 * j], a[m], b[0], b[1]);
          mma_bf16(out[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void store() const {
    const uint32_t heads = args.shape.kv_heads * args.group;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t row = first_row + (warp * MT + m) * 16 + lane / 4 + half * 8;
        const uint32_t token = row / args.group;
        const float inverse = 1.f / weights[m].row(half, args.scale).y;
        if (token >= work.tokens) continue;
        bf16* to = args.out +
                   (size_t(work.token + token) * heads + kv_head * args.group + row % args.group) * HD +
                   lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
          *reinterpret_cast<uint32_t*>(to + j * 8) =
              pack_bf16(out[m][j][2 * half] * inverse, out[m][j][2 * half + 1] * inverse);
        }
      }
    }
  }
};

template <int HD, int MT, int N>
__device__ __forceinline__ void prefill(const AttentionArgs& args) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  let_next_start();
  wait_for_previous();
  Prefill<HD, MT, N>(args, shared_window(dynamic_shared)).run();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_prefill_64(const __grid_constant__ AttentionArgs args) {
  prefill<64, 2, 64>(args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_prefill_96(const __grid_constant__ AttentionArgs args) {
  prefill<96, 2, 64>(args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_prefill_128(const __grid_constant__ AttentionArgs args) {
  prefill<128, 2, 64>(args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_prefill_256(const __grid_constant__ AttentionArgs args) {
  prefill<256, 1, 32>(args);
}
