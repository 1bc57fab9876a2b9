// Tiles of keys and values in shared memory for the attention kernels that use mma.sync.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

__device__ __forceinline__ uint32_t shared_window(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// As load_matrices, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Rows of HD bfloat16. The 16-byte pieces of a row change places with the row, so that eight
// neighbouring rows have a piece in eight different groups of banks.
template <int HD>
struct Rows {
  static constexpr int PIECES = HD / VEC, BYTES = HD * 2;

  static __device__ __forceinline__ uint32_t place(uint32_t row, uint32_t piece) {
    const uint32_t mixed = HD % 64 == 0 ? piece ^ (row % 8) : piece ^ (row / 2 % 4);
    return row * BYTES + mixed * 16;
  }

  // Copies 16 rows that lie together in memory; one warp. Rows from `valid` on become zero.
  static __device__ __forceinline__ void copy16(uint32_t to, const bf16* from, uint32_t valid) {
#pragma unroll
    for (int i = 0; i < PIECES / 2; i++) {
      const uint32_t index = i * 32 + threadIdx.x % 32, row = index / PIECES;
      const bool inside = row < valid;
      copy_async(to + place(row, index % PIECES), from + (inside ? index * VEC : 0), inside);
    }
  }

  // Where this lane points ldmatrix for a 16 x 16 piece of rows that are the A operand, or that are
  // the B operand's k: matrices in the order (row, column), (row + 8, column), (row, column + 8), …
  static __device__ __forceinline__ uint32_t rows_first(uint32_t row, uint32_t column) {
    const uint32_t lane = threadIdx.x % 32;
    return place(row + lane % 16, column / VEC + lane / 16);
  }

  // The same in the order (row, column), (row, column + 8), (row + 8, column), …: rows are the B
  // operand's columns.
  static __device__ __forceinline__ uint32_t columns_first(uint32_t row, uint32_t column) {
    const uint32_t lane = threadIdx.x % 32;
    return place(row + lane % 8 + lane / 16 * 8, column / VEC + lane / 8 % 2);
  }
};
