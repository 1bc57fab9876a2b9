// Quantised weights as the GPU keeps them: value = scale * q + min, with q of BITS bits and one scale
// (and min) for GROUP values along k. With OFFSET > 0 min is -OFFSET * scale and is not stored.
//
// A matrix [rows, k] is cut into pieces of 64 rows x 64 k, a row of pieces after the other, padded with
// zeros; a piece is four records of 16 rows. A record holds, one after the other,
//   the low 4 bits    512 bytes: for lane l 16 bytes, 4 for each step s of 16 k;
//   the high bits     (BITS - 4) 128 bytes: for lane l BITS - 4 words;
//   scales            f16 [64 / GROUP][16 rows], or pairs (scale, min).
// Lane l has the rows l / 4 and l / 4 + 8 at the columns 16 s + 2 (l % 4) + {0, 1, 8, 9}: its part of the
// A fragment of mma.m16n8k16, and with the four records of a piece in four warps of wgmma.m64nNk16.
// The pair p of a step (p = 0: row l / 4, columns 0, 1; 1: row l / 4 + 8; 2, 3: columns 8, 9) has its
// bits at the same place of both halves of a word: of the word s at bit 4 p (low bits, and high bits of
// 8), of the only word at bit 4 s + p (high bit of 5), of the word s / 2 at bit 8 (s % 2) + 2 p (high
// bits of 6).
#pragma once

#include "types.cuh"

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

constexpr int RECORD_ROWS = 16, RECORD_K = 64, STEPS = 4, STEP_K = 16;
constexpr int PIECE_RECORDS = 4, PIECE_ROWS = PIECE_RECORDS * RECORD_ROWS;

// Records before that of rows 16 `row_block` .. and columns 64 `column` .., of `columns` in a row.
__device__ __forceinline__ size_t record_index(int row_block, int column, int columns) {
  return (size_t(row_block / PIECE_RECORDS) * columns + column) * PIECE_RECORDS +
         row_block % PIECE_RECORDS;
}

template <int BITS_, int GROUP_, int OFFSET_>
struct Packed {
  static constexpr int BITS = BITS_, GROUP = GROUP_, OFFSET = OFFSET_;
  static constexpr bool HAS_MIN = OFFSET == 0;
  static constexpr int GROUPS = RECORD_K / GROUP, HIGH_WORDS = BITS - 4;
  static constexpr int HIGH_AT = 512, SCALES_AT = HIGH_AT + HIGH_WORDS * 128;
  static constexpr int RECORD = SCALES_AT + RECORD_ROWS * GROUPS * (HAS_MIN ? 4 : 2);
  static constexpr int PIECE = PIECE_RECORDS * RECORD;
  static_assert(RECORD % 16 == 0);

  // Word and bit of the high bits of a pair.
  static __host__ __device__ constexpr int high_word(int step) {
    return BITS == 8 ? step : BITS == 6 ? step / 2 : 0;
  }
  static __host__ __device__ constexpr int high_bit(int step, int pair) {
    return BITS == 8 ? 4 * pair : BITS == 6 ? step % 2 * 8 + 2 * pair : 4 * step + pair;
  }
};

// What one lane needs of a record.
template <class P>
struct PackedLane {
  uint32_t low[STEPS], high[P::HIGH_WORDS ? P::HIGH_WORDS : 1];
  float scale[2][P::GROUPS], min[2][P::GROUPS];

  __device__ __forceinline__ PackedLane(const uint8_t* record, int lane) {
    const uint4 words = reinterpret_cast<const uint4*>(record)[lane];
    low[0] = words.x, low[1] = words.y, low[2] = words.z, low[3] = words.w;
    const auto* highs = reinterpret_cast<const uint32_t*>(record + P::HIGH_AT);
#pragma unroll
    for (int i = 0; i < P::HIGH_WORDS; i++) high[i] = highs[P::HIGH_WORDS * lane + i];
    const auto* scales = reinterpret_cast<const uint16_t*>(record + P::SCALES_AT);
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
      for (int group = 0; group < P::GROUPS; group++) {
        const int at = group * RECORD_ROWS + row * 8 + lane / 4;
        // `q` reaches the sum with 128 added, where that is how it becomes a float.
        constexpr int ADDED = P::BITS == 8 ? 0 : 128;
        if (P::HAS_MIN) {
          const uint32_t both = reinterpret_cast<const uint32_t*>(scales)[at];
          scale[row][group] = half_to_float(static_cast<uint16_t>(both));
          min[row][group] = half_to_float(static_cast<uint16_t>(both >> 16)) - ADDED * scale[row][group];
        } else {
          scale[row][group] = half_to_float(scales[at]);
          min[row][group] = -(P::OFFSET + ADDED) * scale[row][group];
        }
      }
    }
  }

  // The A fragment of a step, rounded to bfloat16.
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    const int group = step * STEP_K / P::GROUP;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      uint32_t q = (low[step] >> (4 * pair)) & 0x000f000f;
      if (P::HIGH_WORDS > 0) {
        constexpr uint32_t MASK = 0x00010001 * ((1 << P::HIGH_WORDS) - 1);
        q |= ((high[P::high_word(step)] >> P::high_bit(step, pair)) & MASK) << 4;
      }
      const float2 x = to_floats(q);
      const float s = scale[pair % 2][group], m = min[pair % 2][group];
      a[pair] = pack_bf16(fmaf(x.x, s, m), fmaf(x.y, s, m));
    }
  }

  // Both halves of `q` as floats; below 8 bits with 128 added: or-ed into the mantissa of a bfloat16
  // 128, whose last bit counts 1. For 8 bits 2^23 is that number, as a float.
  static __device__ __forceinline__ float2 to_floats(uint32_t q) {
    if (P::BITS < 8) {
      q |= 0x43004300;
      return make_float2(__uint_as_float(q << 16), __uint_as_float(q & 0xffff0000));
    }
    const float low = __uint_as_float(__byte_perm(q, 0x4b000000, 0x7540));
    const float high = __uint_as_float(__byte_perm(q, 0x4b000000, 0x7542));
    return make_float2(low - 8388608.f, high - 8388608.f);
  }
};
