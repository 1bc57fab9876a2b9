// Types that every kernel uses, and bfloat16 by hand: a bfloat16 is the upper half of a float.
#pragma once
#include <cstdint>

struct alignas(2) bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

// Two floats, rounded to nearest even, with `low` at the lower address.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ bf16 to_bf16(float x) { return bf16{uint16_t(pack_bf16(x, 0.f))}; }

// Eight elements: one 16-byte access of bfloat16.
constexpr int VEC = 8;

struct Vec8 {
  float x[VEC];
};

__device__ __forceinline__ Vec8 unpack(uint4 raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Vec8 v;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v.x[2 * i] = __uint_as_float(words[i] << 16);
    v.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return v;
}

__device__ __forceinline__ uint4 pack(const Vec8& v) {
  return make_uint4(pack_bf16(v.x[0], v.x[1]), pack_bf16(v.x[2], v.x[3]), pack_bf16(v.x[4], v.x[5]),
                    pack_bf16(v.x[6], v.x[7]));
}

// `p` is aligned to 16 bytes.
__device__ __forceinline__ Vec8 load8(const bf16* p) { return unpack(*reinterpret_cast<const uint4*>(p)); }

__device__ __forceinline__ void store8(bf16* p, const Vec8& v) { *reinterpret_cast<uint4*>(p) = pack(v); }

// `p` is aligned to 16 bytes.
__device__ __forceinline__ Vec8 load8(const float* p) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  return Vec8{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
