// Warpgroup matrix multiply-accumulate (sm_90a) of attention: keys and values in shared memory in tiles of
// 8 rows of 128 bytes with the 128-byte swizzle, weights in registers.
//
// The weights are the A operand (64 x 16), which lies in registers as accumulators leave it: of an
// accumulator d[] of wgmma.cuh, columns 16 k .. 16 k + 15 are d[8 k .. 8 k + 7], packed two by two.
// Values are the B operand (16 x N) with N, not k, contiguous.
#pragma once

#include "tma.cuh"
#include "wgmma.cuh"

// Copies a box of rows of heads, from row group `group` on: see the tensor map in attention_sm90a.cu.
__device__ __forceinline__ void tma_load_rows(uint32_t to, const TensorMap& map, int group, uint32_t barrier,
                                              uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %3, %3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(0), "r"(group), "l"(policy)
      : "memory");
}

__device__ __forceinline__ uint64_t swizzled_tile(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t SWIZZLE_128B = 1;
  return ((address & 0x3ffff) >> 4) | (uint64_t(leading >> 4) << 16) | (uint64_t(stride >> 4) << 32) |
         (SWIZZLE_128B << 62);
}

// Describes 64 elements of keys whose groups of 8 rows are `group` bytes apart. Adding WGMMA_NEXT_K moves on
// by 16 elements.
__device__ __forceinline__ uint64_t keys_tile(uint32_t address, uint32_t group) {
  return swizzled_tile(address, 16, group);
}

// Describes values: parts of 64 elements are `part` bytes apart, groups of 8 rows `group` bytes.
__device__ __forceinline__ uint64_t values_tile(uint32_t address, uint32_t part, uint32_t group) {
  return swizzled_tile(address, part, group);
}

// d = a b + (accumulate ? d : 0)
template <int N>
struct WgmmaValues;

#define VALUES_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VALUES_16(i) VALUES_4(i), VALUES_4(i + 4), VALUES_4(i + 8), VALUES_4(i + 12)

template <>
struct WgmmaValues<64> {
  static __device__ __forceinline__ void run(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
        : VALUES_16(0), VALUES_16(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

template <>
struct WgmmaValues<96> {
  static __device__ __forceinline__ void run(float (&d)[48], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
        "}, {%48,%49,%50,%51}, %52, p, 1, 1, 1;\n}\n"
        : VALUES_16(0), VALUES_16(16), VALUES_16(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

template <>
struct WgmmaValues<128> {
  static __device__ __forceinline__ void run(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}\n"
        : VALUES_16(0), VALUES_16(16), VALUES_16(32), VALUES_16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

template <>
struct WgmmaValues<256> {
  static __device__ __forceinline__ void run(float (&d)[128], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
        "}, {%128,%129,%130,%131}, %132, p, 1, 1, 1;\n}\n"
        : VALUES_16(0), VALUES_16(16), VALUES_16(32), VALUES_16(48),
          VALUES_16(64), VALUES_16(80), VALUES_16(96), VALUES_16(112)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

#undef VALUES_16
#undef VALUES_4
