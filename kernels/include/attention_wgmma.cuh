// Warpgroup matrix multiply-accumulate (sm_90a) of attention weights, in registers, with values.
//
// A (64 x 16) lies in registers as accumulators leave it: of an accumulator d[] of wgmma.cuh, columns
// 16 k .. 16 k + 15 are d[8 k .. 8 k + 7], packed two by two.
// B (16 x N): row p holds a position's values, N of them in parts of 64: a part is a tile of
// 128-byte rows with the 128-byte swizzle, as TMA writes it.
#pragma once

#include "wgmma.cuh"

// Describes the values of a tile that starts at `address` and whose parts are `part_bytes` apart. Adding
// VALUES_NEXT_K moves on by 16 positions.
__device__ __forceinline__ uint64_t values_tile(uint32_t address, uint32_t part_bytes) {
  constexpr uint64_t ROW_GROUP = 8 * SWIZZLE_ROW / 16, SWIZZLE_128B = 1;
  return ((address & 0x3ffff) >> 4) | (uint64_t(part_bytes >> 4) << 16) | (ROW_GROUP << 32) | (SWIZZLE_128B << 62);
}

constexpr uint64_t VALUES_NEXT_K = WGMMA_K * SWIZZLE_ROW / 16;

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
