// A row of logits and passes over it by one block of 1024 threads.
#pragma once
#include <cfloat>

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

// Four tokens' logits with penalties. Few tokens have been seen, so this is rarely called.
__device__ __noinline__ float4 penalised(float4 v, uint2 counts, const SlotParams* p) {
  const uint32_t seen[4] = {counts.x & 0xffff, counts.x >> 16, counts.y & 0xffff, counts.y >> 16};
  float logits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (seen[j] == 0) continue;
    float& logit = logits[j];
    logit = logit > 0.f ? logit / p->repetition_penalty : logit * p->repetition_penalty;
    if (seen[j] > 1) logit -= p->presence_penalty;
    logit -= __fmul_rn(p->frequency_penalty, seen[j] - 1);  // not fused: as on the CPU
  }
  return make_float4(logits[0], logits[1], logits[2], logits[3]);
}

// A row's logits, as they are and, if MODIFIED, with penalties and mask.
template <bool MODIFIED>
struct Row {
  const float* logits;
  uint32_t vocab;
  const uint16_t* counts;  // null: no penalties
  const uint32_t* mask;    // null: all allowed
  const SlotParams* params;

  // Vectors of four tokens; the last may be a part of one.
  __device__ __forceinline__ uint32_t vectors() const { return (vocab + 3) / 4; }

  // What is known of four tokens.
  struct Vector {
    float4 raw;
    uint2 counts;
    uint32_t allowed;  // a bit for each
  };

  __device__ __forceinline__ Vector load(uint32_t i) const {
    Vector v{reinterpret_cast<const float4*>(logits)[i], make_uint2(0, 0), 0xfu};
    if (MODIFIED && counts) v.counts = reinterpret_cast<const uint2*>(counts)[i];
    if (MODIFIED && mask) v.allowed = mask[i / 8] >> i % 8 * 4;
    return v;
  }

  __device__ __forceinline__ float4 modified(const Vector& vector) const {
    float4 v = vector.raw;
    if constexpr (!MODIFIED) return v;
    if (vector.counts.x | vector.counts.y) v = penalised(v, vector.counts, params);
    if (mask) {
      if (!(vector.allowed & 1)) v.x = -INFINITY;
      if (!(vector.allowed & 2)) v.y = -INFINITY;
      if (!(vector.allowed & 4)) v.z = -INFINITY;
      if (!(vector.allowed & 8)) v.w = -INFINITY;
    }
    return v;
  }

  // With `pad` in the place of tokens that do not exist, of which only the last vector has some.
  __device__ __forceinline__ float4 padded(uint32_t i, float4 v, float pad) const {
    if (4 * i + 1 >= vocab) v.y = pad;
    if (4 * i + 2 >= vocab) v.z = pad;
    if (4 * i + 3 >= vocab) v.w = pad;
    return v;
  }

  // The modified logits of the tokens from 4 * i on.
  __device__ __forceinline__ float4 at(uint32_t i) const { return padded(i, modified(load(i)), -INFINITY); }

  // Calls f(first token, four logits, the same modified) for this warp's share of the vectors begin .. end: a
  // contiguous part. All threads of the block take part. Tokens that do not exist have the lowest finite
  // logit, modified none.
  template <typename F>
  __device__ __forceinline__ void scan_both(uint32_t begin, uint32_t end, F f) const {
    const uint32_t share = (end - begin + WARPS - 1) / WARPS;
    const uint32_t from = begin + threadIdx.x / WARP * share, to = min(from + share, end);
    const uint32_t whole = min(to, vocab / 4);  // all four tokens exist
    uint32_t i = from + threadIdx.x % WARP;
    if constexpr (!MODIFIED) {
#pragma unroll 4
      for (; i < whole; i += WARP) {
        const float4 v = reinterpret_cast<const float4*>(logits)[i];
        f(4 * i, v, v);
      }
    } else {
      constexpr int BATCH = 4;  // loads in flight
      for (; i + (BATCH - 1) * WARP < whole; i += BATCH * WARP) {
        Vector batch[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) batch[b] = load(i + b * WARP);
#pragma unroll
        for (int b = 0; b < BATCH; b++) f(4 * (i + b * WARP), batch[b].raw, modified(batch[b]));
      }
    }
#pragma unroll 1
    for (; i < to; i += WARP) {
      const Vector v = load(i);
      f(4 * i, padded(i, v.raw, -FLT_MAX), padded(i, modified(v), -INFINITY));
    }
  }

  // Calls f(first token, four modified logits), likewise.
  template <typename F>
  __device__ __forceinline__ void scan_vectors(uint32_t begin, uint32_t end, F f) const {
    scan_both(begin, end, [&](uint32_t t, float4, float4 v) { f(t, v); });
  }

  // Calls f(token, modified logit).
  template <typename F>
  __device__ __forceinline__ void scan(F f) const {
    scan_vectors(0, vectors(), [&](uint32_t t, float4 v) {
      f(t, v.x);
      f(t + 1, v.y);
      f(t + 2, v.z);
      f(t + 3, v.w);
    });
  }
};
