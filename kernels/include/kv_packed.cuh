// Keys and values in 8 bits per element, and back to bfloat16.
//
// Sixteen elements are a piece of 16 bytes; each word of it holds elements 4 i .. 4 i + 3 in its bytes 1, 3,
// 0 and 2, where halves of words are two neighbours, as they are in a word of bfloat16. An element is
// code * scale, rounded to bfloat16; the scale is a bfloat16.
//   KV_INT8  sign and magnitude, up to 127. Keys and queries are rotated first (rotate16), so that a few
//            large elements, which some models' keys have, do not cost the others their bits.
//   KV_FP8   e4m3, up to 448 (Micikevicius et al. 2022).
// The scale of what is not finite is NaN, so that the fault shows in everything that reads it.
#pragma once

#include "kv.cuh"
#include "types.cuh"

// a b + c, rounded once; two at a time.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// ---- to bfloat16

// Turns a piece into 16 elements, two neighbours per word.
__device__ __forceinline__ void unpack16(uint4 piece, bf16 scale, KvFormat format, uint4& low, uint4& high) {
  constexpr uint32_t SIGNS = 0x80008000u, MINUS_ZEROS = SIGNS;
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  const uint32_t scales = uint32_t(scale.bits) * 0x10001u;
  uint32_t out[8];
  if (format == KV_INT8) {
    // 128 + magnitude is a bfloat16 whose last bits are the magnitude.
    constexpr uint32_t MAGNITUDES = 0x007f007fu, PLUS_128 = 0x43004300u, MINUS_128 = 0xc300c300u;
    const uint32_t offset = fma_bf16x2(scales, MINUS_128, MINUS_ZEROS);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t first = (words[i] >> 8 & MAGNITUDES) | PLUS_128, second = (words[i] & MAGNITUDES) | PLUS_128;
      out[2 * i] = fma_bf16x2(first, scales, offset) ^ (words[i] & SIGNS);
      out[2 * i + 1] = fma_bf16x2(second, scales, offset) ^ (words[i] << 8 & SIGNS);
    }
  } else {
    // Exponent and mantissa in the place of bfloat16's are 2^-120 of what they should be.
    constexpr uint32_t MAGNITUDES = 0x07f007f0u, POWERS_120 = 0x7b807b80u;
    const uint32_t factors = fma_bf16x2(scales, POWERS_120, MINUS_ZEROS);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t first = words[i] >> 4 & MAGNITUDES, second = words[i] << 4 & MAGNITUDES;
      out[2 * i] = fma_bf16x2(first, factors, MINUS_ZEROS) ^ (words[i] & SIGNS);
      out[2 * i + 1] = fma_bf16x2(second, factors, MINUS_ZEROS) ^ (words[i] << 8 & SIGNS);
    }
  }
  low = make_uint4(out[0], out[1], out[2], out[3]);
  high = make_uint4(out[4], out[5], out[6], out[7]);
}

// ---- from float

// The Walsh-Hadamard transform, orthonormal: it spreads a large element over all, and products of two
// pieces stay the same when both are rotated (Ashkboos et al., QuaRot, 2024).
__device__ __forceinline__ void rotate16(float (&x)[16]) {
#pragma unroll
  for (int half = 1; half < 16; half *= 2) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      if (i & half) continue;
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
#pragma unroll
  for (int i = 0; i < 16; i++) x[i] *= 0.25f;
}

// The largest magnitude; infinite if some element is not finite.
__device__ __forceinline__ float largest16(const float (&x)[16]) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    constexpr float FINITE = 3.402823466e38f;
    largest = fabsf(x[i]) <= FINITE ? fmaxf(largest, fabsf(x[i])) : INFINITY;
  }
  return largest;
}

// What pieces with elements up to `largest` are multiplied with, and the scale that undoes it.
__device__ __forceinline__ bf16 find_scale(float largest, KvFormat format, float& inverse) {
  inverse = 0.f;
  if (!(largest < INFINITY)) return bf16{0x7fff};
  const float exact = largest / (format == KV_INT8 ? 127.f : 448.f);
  // In unpack16 a larger one would overflow.
  const float bounded = format == KV_INT8 ? exact : fminf(exact, 64.f);
  // Rounded up, so that no code is larger than it may be.
  const float scale = __uint_as_float((__float_as_uint(bounded) + 0xffffu) & 0xffff0000u);
  if (scale < 1e-30f) return bf16{0};
  inverse = 1.f / scale;
  return to_bf16(scale);
}

// Rounds to the nearest code, ties to even.
__device__ __forceinline__ uint32_t code(float x, KvFormat format) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u;
  const float magnitude = fabsf(x);
  if (format == KV_INT8) return sign | uint32_t(fminf(rintf(magnitude), 127.f));
  // Below 2^-6 codes are multiples of 2^-9; above, exponent and mantissa with another bias.
  if (magnitude < 0.015625f) return sign | uint32_t(rintf(magnitude * 512.f));
  const uint32_t rounded = __float_as_uint(fminf(magnitude, 448.f)) + 0x7ffffu + (bits >> 20 & 1u);
  return sign | ((rounded >> 20) - (120u << 3));
}

__device__ __forceinline__ uint4 pack16(const float (&x)[16], float inverse, KvFormat format) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    words[i] = code(x[4 * i] * inverse, format) << 8 | code(x[4 * i + 1] * inverse, format) << 24 |
               code(x[4 * i + 2] * inverse, format) | code(x[4 * i + 3] * inverse, format) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
