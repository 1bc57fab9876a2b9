// Philox4x32-10, a counter-based random number generator (Salmon, Moraes, Dror & Shaw 2011,
// "Parallel random numbers: as easy as 1, 2, 3"); the same numbers as on the CPU.
#pragma once
#include <cstdint>

// 64 random bits that depend on the seed and the position only.
__device__ __forceinline__ uint64_t philox(uint64_t seed, uint32_t position) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(c0) * 0xd2511f53u, b = uint64_t(c2) * 0xcd9e8d57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return uint64_t(c1) << 32 | c0;
}

// floor(u * total) for the uniform u in [0, 1) of 53 bits that the CPU draws too.
__device__ __forceinline__ uint64_t draw_below(uint64_t total, uint64_t seed, uint32_t position) {
  return __umul64hi(philox(seed, position) >> 11 << 11, total);
}
