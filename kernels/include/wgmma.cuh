// Warpgroup matrix multiply-accumulate (sm_90a): PTX ISA 8.0, "wgmma".
//
// A 64 x 16 tile of A times a 16 x N tile of B, bfloat16 in shared memory, is added to float32
// accumulators in registers. Both tiles are K-major (each row holds consecutive k) in rows of 128
// bytes with the 128-byte swizzle: the 16-byte piece c of row r lies at piece c ^ (r % 8), the
// way TMA writes it with CU_TENSOR_MAP_SWIZZLE_128B. Tiles start at multiples of 1024 bytes.
//
// Thread t of the warpgroup holds accumulators d[4j .. 4j+3] at rows r, r, r+8, r+8 and columns
// c, c+1, c, c+1, where r = 16 (t / 32) + t % 32 / 4 and c = 8j + 2 (t % 4).
#pragma once

#include <cstdint>

constexpr int SWIZZLE_ROW = 128;                // bytes
constexpr int SWIZZLE_K = SWIZZLE_ROW / 2;      // bfloat16 elements
constexpr int WGMMA_K = 16;

// Describes a tile that starts at `address`: row groups of 8 lie 1024 bytes apart. Adding 2 moves on
// by 16 elements along k.
__device__ __forceinline__ uint64_t wgmma_tile(uint32_t address) {
  constexpr uint64_t ROW_GROUP = 8 * SWIZZLE_ROW / 16, SWIZZLE_128B = 1;
  return ((address & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (ROW_GROUP << 32) | (SWIZZLE_128B << 62);
}

constexpr uint64_t WGMMA_NEXT_K = WGMMA_K * 2 / 16;

// Orders register accesses before the first wgmma, and between those of different accumulators.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `PENDING` committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of the accumulators across this point.
template <int COUNT>
__device__ __forceinline__ void wgmma_keep(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a b + (accumulate ? d : 0); a and b as wgmma_tile describes them.
template <int N>
struct Wgmma;

#define WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_8(i) WGMMA_4(i), WGMMA_4(i + 4)
#define WGMMA_16(i) WGMMA_8(i), WGMMA_8(i + 8)
// Operands 0 to 2 are the two descriptors and the predicate.
#define WGMMA_REGISTERS_4 "%3,%4,%5,%6"
#define WGMMA_REGISTERS_8 WGMMA_REGISTERS_4 ",%7,%8,%9,%10"
#define WGMMA_REGISTERS_16 WGMMA_REGISTERS_8 ",%11,%12,%13,%14,%15,%16,%17,%18"
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_16 \
  ",%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34"
#define WGMMA_REGISTERS_40 WGMMA_REGISTERS_32 ",%35,%36,%37,%38,%39,%40,%41,%42"
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_40 ",%43,%44,%45,%46,%47,%48,%49,%50"
#define WGMMA_REGISTERS_56 WGMMA_REGISTERS_48 ",%51,%52,%53,%54,%55,%56,%57,%58"
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_56 ",%59,%60,%61,%62,%63,%64,%65,%66"
#define WGMMA_REGISTERS_72 WGMMA_REGISTERS_64 ",%67,%68,%69,%70,%71,%72,%73,%74"
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_72 ",%75,%76,%77,%78,%79,%80,%81,%82"
#define WGMMA_REGISTERS_88 WGMMA_REGISTERS_80 ",%83,%84,%85,%86,%87,%88,%89,%90"
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_88 ",%91,%92,%93,%94,%95,%96,%97,%98"
#define WGMMA_REGISTERS_112 WGMMA_REGISTERS_96 \
  ",%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114"
#define WGMMA_REGISTERS_120 WGMMA_REGISTERS_112 ",%115,%116,%117,%118,%119,%120,%121,%122"
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_120 ",%123,%124,%125,%126,%127,%128,%129,%130"
#define WGMMA_OPERANDS_4 WGMMA_4(0)
#define WGMMA_OPERANDS_8 WGMMA_OPERANDS_4, WGMMA_4(4)
#define WGMMA_OPERANDS_16 WGMMA_OPERANDS_8, WGMMA_8(8)
#define WGMMA_OPERANDS_32 WGMMA_OPERANDS_16, WGMMA_16(16)
#define WGMMA_OPERANDS_40 WGMMA_OPERANDS_32, WGMMA_8(32)
#define WGMMA_OPERANDS_48 WGMMA_OPERANDS_40, WGMMA_8(40)
#define WGMMA_OPERANDS_56 WGMMA_OPERANDS_48, WGMMA_8(48)
#define WGMMA_OPERANDS_64 WGMMA_OPERANDS_56, WGMMA_8(56)
#define WGMMA_OPERANDS_72 WGMMA_OPERANDS_64, WGMMA_8(64)
#define WGMMA_OPERANDS_80 WGMMA_OPERANDS_72, WGMMA_8(72)
#define WGMMA_OPERANDS_88 WGMMA_OPERANDS_80, WGMMA_8(80)
#define WGMMA_OPERANDS_96 WGMMA_OPERANDS_88, WGMMA_8(88)
#define WGMMA_OPERANDS_112 WGMMA_OPERANDS_96, WGMMA_16(96)
#define WGMMA_OPERANDS_120 WGMMA_OPERANDS_112, WGMMA_8(112)
#define WGMMA_OPERANDS_128 WGMMA_OPERANDS_120, WGMMA_8(120)

#define WGMMA_SHAPE(N, COUNT)                                                                     \
  template <>                                                                                     \
  struct Wgmma<N> {                                                                               \
    static __device__ __forceinline__ void run(float (&d)[COUNT], uint64_t a, uint64_t b,         \
                                               int accumulate) {                                  \
      asm volatile(                                                                               \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_REGISTERS_##COUNT    \
          "}, %0, %1, p, 1, 1, 0, 0;\n}\n"                                                        \
          : "+l"(a), "+l"(b), "+r"(accumulate), WGMMA_OPERANDS_##COUNT);                          \
    }                                                                                             \
  };

WGMMA_SHAPE(8, 4)
WGMMA_SHAPE(16, 8)
WGMMA_SHAPE(32, 16)
WGMMA_SHAPE(64, 32)
WGMMA_SHAPE(80, 40)
WGMMA_SHAPE(96, 48)
WGMMA_SHAPE(112, 56)
WGMMA_SHAPE(128, 64)
WGMMA_SHAPE(144, 72)
WGMMA_SHAPE(160, 80)
WGMMA_SHAPE(176, 88)
WGMMA_SHAPE(192, 96)
WGMMA_SHAPE(224, 112)
WGMMA_SHAPE(240, 120)
WGMMA_SHAPE(256, 128)
