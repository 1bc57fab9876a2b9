// Weights in GGML's block formats -> records (include/packed.cuh) -> bfloat16.
//
// pack_*     raw     bytes [rows, k / block] in a format of GGML, as a GGUF file has them
//            packed  pieces [ceil(rows / 64), ceil(k / 64)]
// unpack_*   packed  -> out  bf16 [rows, k], rounded to nearest
// embed_*    packed  -> out  bf16 [n, k]: the rows of tokens, scaled, as embed.cu does it
// round_*    f16, f32  -> bf16, rounded to nearest
// k is a multiple of the format's block, and of 32.
//
// Launch: one warp per record, blocks of 256 threads; embed: a block per token; round: any.
// pack and round once per load; unpack once per large product.
// Roofline: raw and packed bytes; packed bytes and 2 rows k.
#include "packed.cuh"
#include "ptx.cuh"
#include "token.cuh"

// The formats: `q` of element i of a block, `scale` and `min` of its group. After the layouts of the
// GGML project, version 2.

__device__ __forceinline__ float half_at(const uint8_t* p) {
  return half_to_float(static_cast<uint16_t>(p[0] | p[1] << 8));
}

// Blocks of 32 with a scale, perhaps a minimum, perhaps a word of fifth bits, and nibbles or bytes.
template <int BITS, bool MIN>
struct Simple {
  static constexpr int BLOCK = 32, GROUP = 32;
  static constexpr int HIGH_AT = MIN ? 4 : 2, Q_AT = HIGH_AT + (BITS == 5 ? 4 : 0);
  static constexpr int BYTES = Q_AT + (BITS == 8 ? 32 : 16);

  static __device__ uint32_t q(const uint8_t* block, int i) {
    if (BITS == 8) return static_cast<uint8_t>(block[Q_AT + i] + 128);
    uint32_t q = (block[Q_AT + i % 16] >> (i / 16 * 4)) & 15;
    if (BITS == 5) q |= ((block[HIGH_AT + i / 8] >> (i % 8)) & 1) << 4;
    return q;
  }
  static __device__ float scale(const uint8_t* block, int) { return half_at(block); }
  static __device__ float min(const uint8_t* block, int) { return MIN ? half_at(block + 2) : 0.f; }
};

// Blocks of 256 with a 6-bit scale and minimum per 32: d, dmin, 12 bytes of both, fifth bits, nibbles.
template <int BITS>
struct SuperMin {
  static constexpr int BLOCK = 256, GROUP = 32;
  static constexpr int Q_AT = 16 + (BITS == 5 ? 32 : 0), BYTES = Q_AT + 128;

  static __device__ uint32_t q(const uint8_t* block, int i) {
    uint32_t q = (block[Q_AT + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4)) & 15;
    if (BITS == 5) q |= ((block[16 + i % 32] >> (i / 32)) & 1) << 4;
    return q;
  }
  // 6 bits of group g; `which` is 0 for its scale, 4 for its minimum.
  static __device__ int six(const uint8_t* block, int g, int which) {
    const uint8_t* p = block + 4;
    if (g < 4) return p[g + which] & 63;
    return ((p[g + 4] >> which) & 15) | (p[g - 4 + which] >> 6 << 4);
  }
  static __device__ float scale(const uint8_t* block, int g) {
    return half_at(block) * six(block, g, 0);
  }
  static __device__ float min(const uint8_t* block, int g) {
    return -half_at(block + 2) * six(block, g, 4);
  }
};

// Blocks of 256 with a signed 8-bit scale per 16: low nibbles, high pairs of bits, scales, d.
struct Super6 {
  static constexpr int BLOCK = 256, GROUP = 16, BYTES = 210;

  static __device__ uint32_t q(const uint8_t* block, int i) {
    const int half = i / 128, quarter = i / 32 % 4;
    const uint32_t low = block[half * 64 + quarter % 2 * 32 + i % 32] >> (quarter / 2 * 4);
    const uint32_t high = block[128 + half * 32 + i % 32] >> (quarter * 2);
    return (low & 15) | (high & 3) << 4;
  }
  static __device__ float scale(const uint8_t* block, int g) {
    return half_at(block + 208) * static_cast<int8_t>(block[192 + g]);
  }
  static __device__ float min(const uint8_t*, int) { return 0.f; }
};

struct Where {
  int row_block, column, lane;  // the warp's record
};

__device__ __forceinline__ int columns_of(int k) { return (k + RECORD_K - 1) / RECORD_K; }

// Warps are in the order of records.
__device__ __forceinline__ bool locate(int rows, int k, Where* where) {
  const int columns = columns_of(k), warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int piece = warp / PIECE_RECORDS, piece_row = piece / columns;
  *where = {piece_row * PIECE_RECORDS + warp % PIECE_RECORDS, piece % columns,
            static_cast<int>(threadIdx.x % 32)};
  return piece_row * PIECE_ROWS < rows;
}

template <class Format, class P>
__device__ __forceinline__ void pack(const uint8_t* raw, int rows, int k, uint8_t* packed) {
  static_assert(Format::GROUP == P::GROUP);
  Where at;
  if (!locate(rows, k, &at)) return;
  const size_t row_bytes = size_t(k / Format::BLOCK) * Format::BYTES;
  const auto block = [&](int row, int column) {
    return raw + row * row_bytes + size_t(column / Format::BLOCK) * Format::BYTES;
  };
  const int first = at.column * RECORD_K;
  uint8_t* record = packed + record_index(at.row_block, at.column, columns_of(k)) * P::RECORD;

  uint32_t low[STEPS] = {}, high[4] = {};
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int pair = i / 2, half = i % 2 * 16;
      const int row = at.row_block * RECORD_ROWS + at.lane / 4 + pair % 2 * 8;
      const int column = first + step * STEP_K + at.lane % 4 * 2 + pair / 2 * 8 + i % 2;
      if (row >= rows || column >= k) continue;
      const uint32_t q = Format::q(block(row, column), column % Format::BLOCK);
      low[step] |= (q & 15) << (4 * pair + half);
      if (P::HIGH_WORDS > 0) {
        high[P::high_word(step)] |= q >> 4 << (P::high_bit(step, pair) + half);
      }
    }
  }
  reinterpret_cast<uint4*>(record)[at.lane] = make_uint4(low[0], low[1], low[2], low[3]);
  auto* highs = reinterpret_cast<uint32_t*>(record + P::HIGH_AT);
#pragma unroll
  for (int i = 0; i < P::HIGH_WORDS; i++) highs[P::HIGH_WORDS * at.lane + i] = high[i];

  auto* scales = reinterpret_cast<uint16_t*>(record + P::SCALES_AT);
  for (int i = at.lane; i < RECORD_ROWS * P::GROUPS; i += 32) {
    const int row = at.row_block * RECORD_ROWS + i % RECORD_ROWS;
    const int column = first + i / RECORD_ROWS * P::GROUP;
    float scale = 0.f, min = 0.f;
    if (row < rows && column < k) {
      const int group = column % Format::BLOCK / P::GROUP;
      scale = Format::scale(block(row, column), group);
      min = Format::min(block(row, column), group);
    }
    if (P::HAS_MIN) {
      reinterpret_cast<uint32_t*>(scales)[i] = float_to_half(scale) | float_to_half(min) << 16;
    } else {
      scales[i] = float_to_half(scale);
    }
  }
}

constexpr int UNPACK_WARPS = 8;

// Through shared memory, so that rows of 128 bytes are written as such: the 16-byte piece c of row r lies
// at c ^ (r % 8), without bank conflicts.
template <class P>
__device__ __forceinline__ void unpack(const uint8_t* packed, int rows, int k, bf16* out) {
  __shared__ uint4 tiles[UNPACK_WARPS][RECORD_ROWS][8];
  let_next_start();
  Where at;
  const bool inside = locate(rows, k, &at);
  auto& tile = tiles[threadIdx.x / 32];
  if (inside) {
    const size_t index = record_index(at.row_block, at.column, columns_of(k));
    const PackedLane<P> weights(packed + index * P::RECORD, at.lane);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint32_t a[4];
      weights.fragment(step, a);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = at.lane / 4 + i % 2 * 8, piece = 2 * step + i / 2;
        reinterpret_cast<uint32_t*>(&tile[row][piece ^ (row % 8)])[at.lane % 4] = a[i];
      }
    }
    __syncwarp();
  }
  // The previous kernel may still read what is written here.
  wait_for_previous();
  if (!inside) return;
  const int piece = at.lane % 8, column = at.column * RECORD_K + piece * VEC;
  if (column >= k) return;
#pragma unroll
  for (int i = 0; i < RECORD_ROWS / 4; i++) {
    const int in_tile = 4 * i + at.lane / 8, row = at.row_block * RECORD_ROWS + in_tile;
    if (row >= rows) continue;
    *reinterpret_cast<uint4*>(out + size_t(row) * k + column) = tile[in_tile][piece ^ (in_tile % 8)];
  }
}

// Four lanes of a record have a row: they are neighbouring threads here.
template <class P>
__device__ __forceinline__ void embed(const uint32_t* tokens, const int32_t* last,
                                      const uint8_t* packed, float scale, int k, bf16* out) {
  let_next_start();
  wait_for_previous();
  const int row = token_at(tokens, last), columns = columns_of(k);
  bf16* to = out + size_t(blockIdx.x) * k;
  for (int i = threadIdx.x; i < 4 * columns; i += blockDim.x) {
    const size_t index = record_index(row / RECORD_ROWS, i / 4, columns);
    const PackedLane<P> weights(packed + index * P::RECORD, row % 8 * 4 + i % 4);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint32_t a[4];
      weights.fragment(step, a);
      const int column = i / 4 * RECORD_K + step * STEP_K + i % 4 * 2;
      if (column >= k) continue;
      const uint32_t pairs[2] = {row % RECORD_ROWS < 8 ? a[0] : a[1], row % RECORD_ROWS < 8 ? a[2] : a[3]};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float low = __uint_as_float(pairs[half] << 16) * scale;
        const float high = __uint_as_float(pairs[half] & 0xffff0000) * scale;
        *reinterpret_cast<uint32_t*>(to + column + 8 * half) = pack_bf16(low, high);
      }
    }
  }
}

template <class Load>
__device__ __forceinline__ void round_all(size_t n, bf16* out, Load load) {
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    out[i] = to_bf16(load(i));
  }
}

extern "C" __global__ void round_f16(const uint16_t* raw, size_t n, bf16* out) {
  round_all(n, out, [=](size_t i) { return half_to_float(raw[i]); });
}

extern "C" __global__ void round_f32(const float* raw, size_t n, bf16* out) {
  round_all(n, out, [=](size_t i) { return raw[i]; });
}

#define PACK(NAME, FORMAT, ...)                                                                \
  extern "C" __global__ void pack_##NAME(const uint8_t* raw, int rows, int k, uint8_t* packed) { \
    pack<FORMAT, Packed<__VA_ARGS__>>(raw, rows, k, packed);                                   \
  }
#define UNPACK(NAME, ...)                                                                         \
  extern "C" __global__ void __launch_bounds__(32 * UNPACK_WARPS)                                 \
      unpack_##NAME(const uint8_t* packed, int rows, int k, bf16* out) {                          \
    unpack<Packed<__VA_ARGS__>>(packed, rows, k, out);                                            \
  }                                                                                               \
  extern "C" __global__ void embed_##NAME(const uint32_t* tokens, const int32_t* last,            \
                                          const uint8_t* packed, float scale, int k, bf16* out) { \
    embed<Packed<__VA_ARGS__>>(tokens, last, packed, scale, k, out);                              \
  }

using Q4_0 = Simple<4, false>;
using Q4_1 = Simple<4, true>;
using Q5_0 = Simple<5, false>;
using Q5_1 = Simple<5, true>;
using Q8_0 = Simple<8, false>;

PACK(q4_0, Q4_0, 4, 32, 8)
PACK(q4_1, Q4_1, 4, 32, 0)
PACK(q4_k, SuperMin<4>, 4, 32, 0)
PACK(q5_0, Q5_0, 5, 32, 16)
PACK(q5_1, Q5_1, 5, 32, 0)
PACK(q5_k, SuperMin<5>, 5, 32, 0)
PACK(q6_k, Super6, 6, 16, 32)
PACK(q8_0, Q8_0, 8, 32, 128)

UNPACK(4, 4, 32, 8)
UNPACK(4_min, 4, 32, 0)
UNPACK(5, 5, 32, 16)
UNPACK(5_min, 5, 32, 0)
UNPACK(6, 6, 16, 32)
UNPACK(8, 8, 32, 128)
