// Warp matrix multiply-accumulate and asynchronous copies of all GPUs since Ampere: PTX ISA 7.0,
// "mma.m16n8k16", "ldmatrix", "cp.async".
//
// Fragments of one warp, for lane l:
//   A (16 x 16)  a[0..3]: rows l/4, l/4 + 8, l/4, l/4 + 8, columns 2 (l%4) + {0, 1}, from a[2] on + 8
//   B (16 x 8)   b[0..1]: k = 2 (l%4) + {0, 1}, then + 8, column l/4
//   C (16 x 8)   c[0..3]: rows l/4, l/4, l/4 + 8, l/4 + 8, columns 2 (l%4) + {0, 1}
#pragma once

#include <cstdint>

// c += a b, bfloat16 with float32 accumulation.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Copies 16 bytes to shared memory, past L1; writes zeros when `valid` is false.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `PENDING` committed groups of this thread are unfinished.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
