// A row of logits and passes over it by one block of 1024 threads.
#pragma once
#include "reduce.cuh"
#include "sampling.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / WARP;

// Unsigned numbers in the order of the floats; +0 and -0 are equal, as they are among floats.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A token's rank as a number: its logit, then the complement of its id, so that of equals the lowest
// id is the highest.
__device__ __forceinline__ uint64_t ranked(uint32_t token, float logit) {
  return uint64_t(key_of(logit)) << 32 | uint32_t(~token);
}

__device__ __forceinline__ float ranked_logit(uint64_t rank) { return logit_of(uint32_t(rank >> 32)); }

// A row's logits, as they are or with penalties and mask.
struct Row {
  const float* logits;
  uint32_t vocab;
  const uint16_t* counts;  // null: no penalties
  const uint32_t* mask;    // null: all allowed
  const SlotParams* params;

  // Vectors of four tokens; the last may be a part of one.
  __device__ __forceinline__ uint32_t vectors() const { return (vocab + 3) / 4; }

  __device__ __forceinline__ float modified(uint32_t token, float logit) const {
    if (mask && !(mask[token / 32] >> token % 32 & 1)) return -INFINITY;
    if (counts) {
      const uint32_t count = counts[token];
      if (count > 0) {
        const float r = params->repetition_penalty;
        logit = logit > 0.f ? logit / r : logit * r;
        if (count > 1) logit -= params->presence_penalty;
        logit -= __fmul_rn(params->frequency_penalty, count - 1);  // not fused: as on the CPU
      }
    }
    return logit;
  }

  // The vector from token 4 * i on; `pad` for tokens that do not exist.
  __device__ __noinline__ float4 load(uint32_t i, float pad) const {
    const float4 v = reinterpret_cast<const float4*>(logits)[i];
    float four[4] = {v.x, v.y, v.z, v.w};
    for (uint32_t j = 0; j < 4; j++) four[j] = 4 * i + j < vocab ? modified(4 * i + j, four[j]) : pad;
    return make_float4(four[0], four[1], four[2], four[3]);
  }

  // Calls f(first token, four logits) for this warp's share of the vectors begin .. end: a
  // contiguous part. All threads of the block take part.
  template <typename F>
  __device__ __forceinline__ void scan_vectors(uint32_t begin, uint32_t end, F f, float pad = -INFINITY) const {
    const uint32_t share = (end - begin + WARPS - 1) / WARPS;
    const uint32_t from = begin + threadIdx.x / WARP * share, to = min(from + share, end);
    uint32_t i = from + threadIdx.x % WARP;
    if (!counts && !mask) {  // the common case gets the fast loop, in which all four tokens exist
      const uint32_t whole = min(to, vocab / 4);
#pragma unroll 4
      for (; i < whole; i += WARP) f(4 * i, reinterpret_cast<const float4*>(logits)[i]);
    }
    for (; i < to; i += WARP) f(4 * i, load(i, pad));
  }

  // Calls f(token, logit).
  template <typename F>
  __device__ __forceinline__ void scan(F f, float pad = -INFINITY) const {
    scan_vectors(
        0, vectors(),
        [&](uint32_t t, float4 v) {
          f(t, v.x);
          f(t + 1, v.y);
          f(t + 2, v.z);
          f(t + 3, v.w);
        },
        pad);
  }
};
