// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias) on any GPU since Ampere.
//
// x, w  bf16, row-major;  out  bf16 or, when `out_f32` is given, f32, `stride` elements from a token to
//       the next;  bias  f32 or null
// k is a multiple of 8; for bf16 output so are `outputs` and `stride`.
//
// The product is computed as A B^T: with many tokens A is x, with few it is w, so that the weights
// fill the 16 rows of an mma. Each block walks over tiles of BM rows of A times BN rows of B in a
// ring of cp.async stages of 64 k; each of WARPS_M x WARPS_N warps holds its part of the tile in
// registers. Every output element is one accumulator to which mma adds 16 consecutive k at a time,
// in the order of k: its bits depend neither on the tile nor on the number of tokens.
//
// Shared memory has rows of 128 bytes in which the 16-byte piece c of row r lies at piece
// c ^ (r % 8): without bank conflicts for copies and for ldmatrix.
//
// Launch: any number of blocks, at best the number of tiles or a multiple of the SMs.
// Roofline: weights once from memory with few tokens, 2 tokens outputs k operations with many.
#include "mma.cuh"
#include "ptx.cuh"
#include "types.cuh"

struct Args {
  const bf16 *a, *b;
  bf16* out;
  float* out_f32;
  const float* bias;
  int rows_a, rows_b, k, stride;
};

enum class Weights { A, B };

constexpr int BK = 64, PIECES = BK / VEC, ROW = BK * 2;

template <Weights WEIGHTS, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES>
struct Gemm {
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;
  static constexpr int STAGE = (BM + BN) * ROW;
  static_assert(WM % 16 == 0 && WN % 16 == 0);

  const Args& args;
  const uint32_t shared;
  int row_a, row_b;  // the tile
  float acc[WM / 16][WN / 8][4];

  static __device__ __forceinline__ uint32_t place(int row, int piece) {
    return row * ROW + ((piece ^ (row % 8)) * 16);
  }

  __device__ __forceinline__ void load(int step) {
    const uint32_t stage = shared + step % STAGES * STAGE;
    for (int i = threadIdx.x; i < (BM + BN) * PIECES; i += THREADS) {
      const int row = i / PIECES, piece = i % PIECES, k = step * BK + piece * VEC;
      const bool in_a = row < BM;
      const int source = in_a ? row_a + row : row_b + row - BM;
      const bool valid = source < (in_a ? args.rows_a : args.rows_b) && k < args.k;
      const bf16* from = in_a ? args.a : args.b;
      copy_async(stage + place(row, piece), from + (valid ? size_t(source) * args.k + k : 0), valid);
    }
  }

  __device__ __forceinline__ void multiply(int step) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int m = warp / WARPS_N * WM, n = BM + warp % WARPS_N * WN;
    const uint32_t stage = shared + step % STAGES * STAGE;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece += 2) {
      uint32_t a[WM / 16][4], b[WN / 16][4];
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
        load_matrices(a[i], stage + place(m + 16 * i + lane % 16, piece + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < WN / 16; j++) {
        const int row = n + 16 * j + lane % 8 + lane / 16 * 8;
        load_matrices(b[j], stage + place(row, piece + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
#pragma unroll
        for (int j = 0; j < WN / 8; j++) {
          mma_bf16(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int m = row_a + warp / WARPS_N * WM + lane / 4;
    const int n = row_b + warp % WARPS_N * WN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < WM / 16; i++) {
#pragma unroll
      for (int j = 0; j < WN / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          store_one(m + 16 * i + e / 2 * 8, n + 8 * j + e % 2, acc[i][j][e]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_one(int a, int b, float value) {
    if (a >= args.rows_a || b >= args.rows_b) return;
    const bool weights_a = WEIGHTS == Weights::A;
    const int token = weights_a ? b : a, output = weights_a ? a : b;
    const size_t to = size_t(token) * args.stride + output;
    if (args.bias) value += args.bias[output];
    if (args.out_f32) {
      args.out_f32[to] = value;
    } else {
      args.out[to] = to_bf16(value);
    }
  }

  __device__ __forceinline__ void tile(int a, int b) {
    row_a = a * BM, row_b = b * BN;
    const int steps = (args.k + BK - 1) / BK;
#pragma unroll
    for (int i = 0; i < WM / 16 * WN / 8 * 4; i++) (&acc[0][0][0])[i] = 0.f;
    for (int step = 0; step < STAGES - 1; step++) {
      if (step < steps) load(step);
      copy_async_commit();
    }
    for (int step = 0; step < steps; step++) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();
      if (step + STAGES - 1 < steps) load(step + STAGES - 1);
      copy_async_commit();
      multiply(step);
    }
    store();
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    const int tiles_a = (args.rows_a + BM - 1) / BM, tiles_b = (args.rows_b + BN - 1) / BN;
    // Neighbours in time share their weights.
    const int tokens = WEIGHTS == Weights::A ? tiles_b : tiles_a;
    for (int i = blockIdx.x; i < tiles_a * tiles_b; i += gridDim.x) {
      const int weights = i / tokens, token = i % tokens;
      WEIGHTS == Weights::A ? tile(weights, token) : tile(token, weights);
    }
  }
};

#define GEMM(NAME, WEIGHTS, BM, BN, WARPS_M, WARPS_N, STAGES)                                   \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N) NAME(const Args args) {  \
    extern __shared__ __align__(128) uint8_t dynamic_shared[];                                  \
    let_next_start();                                                                           \
    wait_for_previous();                                                                        \
    Gemm<WEIGHTS, BM, BN, WARPS_M, WARPS_N, STAGES> gemm{                                       \
        args, static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared))};                 \
    gemm.run();                                                                                 \
  }

// Shared memory: STAGES (BM + BN) 128 bytes.
GEMM(gemm_bf16_tokens, Weights::B, 128, 128, 2, 4, 3)
GEMM(gemm_bf16_weights_16, Weights::A, 64, 16, 4, 1, 6)
GEMM(gemm_bf16_weights_64, Weights::A, 64, 64, 4, 1, 5)
