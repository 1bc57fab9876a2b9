// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias) for at most 64 tokens, w in records
// (include/packed.cuh). On any GPU since Ampere.
//
// x     bf16, row-major;  out  bf16 or, when `out_f32` is given, f32;  bias  f32 or null
// k     a multiple of 32
//
// Each warp takes 16 outputs and streams their records, which lie one after the other, through a ring
// in shared memory of its own; no barrier between warps. It turns a record into A fragments of mma in
// registers. Tokens are the columns; they are read through L1, which the warps of an SM share.
// Weights are rounded to bfloat16 and added up in the order of k: on Hopper, where mma.sync and wgmma
// give the same bits, so does unpacking the weights and multiplying them as bfloat16.
//
// Launch: WARPS warps a block, any number of blocks up to ceil(outputs / 16 / WARPS);
// WARPS DEPTH RECORD bytes of shared memory.
// Roofline: the records' bytes. A weight costs about 4 instructions of a lane: at 132 SMs and 1.7 GHz
// that allows 7e12 weights/s, more than memory brings (3.1 TB/s: 5.4e12 of 4.5 bits).
#include "mma.cuh"
#include "packed.cuh"
#include "ptx.cuh"

constexpr int WARPS = 2, DEPTH = 24;

struct Args {
  const bf16* x;
  const uint8_t* weights;
  bf16* out;
  float* out_f32;
  const float* bias;
  int tokens, outputs, k;
};

template <class P, int TILES>
struct Gemm {
  const Args& args;
  uint8_t* ring;
  int lane, steps;
  float acc[TILES][4];

  __device__ __forceinline__ void load(const uint8_t* records, int step) const {
    if (step < steps) {
      const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(slot(step)));
#pragma unroll
      for (int at = 16 * lane; at < P::RECORD; at += 512) {
        copy_async(to + at, records + size_t(step) * P::RECORD + at, true);
      }
    }
    copy_async_commit();
  }

  __device__ __forceinline__ uint8_t* slot(int step) const {
    return ring + step % DEPTH * P::RECORD;
  }

  __device__ __forceinline__ const uint8_t* records(int block) const {
    return args.weights + size_t(block) * steps * P::RECORD;
  }

  __device__ __forceinline__ void prefetch(int block) const {
    for (int step = 0; step < DEPTH - 1; step++) load(records(block), step);
  }

  // Columns 4 (lane % 4) + {0, 1, 2, 3} of 16 of a token.
  __device__ __forceinline__ uint2 token(int tile, int column) const {
    const int row = tile * 8 + lane / 4;
    column += lane % 4 * 4;
    if (row >= args.tokens || column >= args.k) return make_uint2(0, 0);
    return *reinterpret_cast<const uint2*>(args.x + size_t(row) * args.k + column);
  }

  __device__ __forceinline__ void multiply(int step) {
    const PackedLane<P> weights(slot(step), lane);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      uint32_t a[4];
      weights.fragment(s, a);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        if (8 * tile >= args.tokens) break;
        const uint2 b = token(tile, step * RECORD_K + s * STEP_K);
        mma_bf16(acc[tile], a, b.x, b.y);
      }
    }
  }

  __device__ __forceinline__ void store(int block) const {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = tile * 8 + lane % 4 * 2 + i % 2;
        const int output = block * RECORD_ROWS + lane / 4 + i / 2 * 8;
        if (token >= args.tokens || output >= args.outputs) continue;
        const float value = acc[tile][i] + (args.bias ? args.bias[output] : 0.f);
        const size_t to = size_t(token) * args.outputs + output;
        if (args.out_f32) {
          args.out_f32[to] = value;
        } else {
          args.out[to] = to_bf16(value);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int blocks = (args.outputs + RECORD_ROWS - 1) / RECORD_ROWS;
    const int first = blockIdx.x * WARPS + threadIdx.x / 32;
    if (first < blocks) prefetch(first);
    wait_for_previous();
    for (int block = first; block < blocks; block += gridDim.x * WARPS) {
      if (block != first) prefetch(block);
#pragma unroll
      for (int i = 0; i < TILES * 4; i++) (&acc[0][0])[i] = 0.f;
      for (int step = 0; step < steps; step++) {
        copy_async_wait<DEPTH - 2>();
        __syncwarp();
        load(records(block), step + DEPTH - 1);
        multiply(step);
      }
      store(block);
      __syncwarp();
    }
  }
};

template <class P, int TILES>
__device__ __forceinline__ void gemm(const Args& args) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  let_next_start();
  const int warp = threadIdx.x / 32;
  Gemm<P, TILES> gemm{args, dynamic_shared + warp * DEPTH * P::RECORD,
                      static_cast<int>(threadIdx.x % 32), (args.k + RECORD_K - 1) / RECORD_K};
  gemm.run();
}

#define GEMM(NAME, ...)                                                                      \
  extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_packed_##NAME##_8(const Args args) { \
    gemm<Packed<__VA_ARGS__>, 1>(args);                                                      \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(32 * WARPS) gemm_packed_##NAME##_64(const Args args) { \
    gemm<Packed<__VA_ARGS__>, 8>(args);                                                      \
  }

GEMM(4, 4, 32, 8)
GEMM(4_min, 4, 32, 0)
GEMM(5, 5, 32, 16)
GEMM(5_min, 5, 32, 0)
GEMM(6, 6, 16, 32)
GEMM(8, 8, 32, 128)
