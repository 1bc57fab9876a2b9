// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias) with w in records (include/packed.cuh), on
// Hopper.
//
// Weights are the rows of A, 64 per warpgroup: the four records of a piece are the fragments of its four
// warps, which unpack them into registers, from where wgmma takes them. Tokens are the columns of B, BN
// of them at a time. One thread, the producer, streams pieces and tokens through a ring
// of stages of 64 SLICES k with TMA. While wgmma works on a slice the warps unpack the next one.
//
// Weights are rounded to bfloat16 and added up in the order of k, 16 at a time: the same bits as those of
// gemm_sm90a.cuh with unpacked weights.
//
// args.x    box [BN tokens, 64 k];  args.out  bf16, box [at most 64 tokens, 64 outputs], or out_f32 with
//           `stride` elements from a token to the next; both maps with the 128-byte swizzle
// bias      f32 or null
// k         a multiple of 32; for bf16 output `outputs` is one of 8
//
// Launch: any number of blocks up to ceil(outputs / 64 WARPGROUPS) ceil(tokens / BN); PackedShape says how
// many threads and how much shared memory.
// Roofline: the records' bytes; 2 tokens outputs k operations; about 4.5 instructions of a lane for each
// weight and BN tokens.
#include "packed.cuh"
#include "ptx.cuh"
#include "tma.cuh"
#include "wgmma_registers.cuh"

struct PackedGemmArgs {
  TensorMap x;
  // Unused when `out_f32` is given.
  TensorMap out;
  const uint8_t* weights;
  float* out_f32;
  const float* bias;
  int tokens, outputs, k, stride;
};

template <class P_, int WARPGROUPS_, int BN_, int SLICES_, int STAGES_>
struct PackedShape {
  using P = P_;
  static constexpr int WARPGROUPS = WARPGROUPS_, BN = BN_, SLICES = SLICES_, STAGES = STAGES_;
  // Only where the accumulators leave a thread short of registers is the producer a whole warpgroup that
  // gives up its own.
  static constexpr bool TRADE_REGISTERS = WARPGROUPS * BN > 256;
  static constexpr int THREADS = 128 * WARPGROUPS + (TRADE_REGISTERS ? 128 : 32);
  static constexpr int BM = PIECE_ROWS * WARPGROUPS;

  // A stage has the tokens, slice by slice, then each warpgroup's pieces.
  static constexpr int B_SLICE = BN * SWIZZLE_ROW;
  static constexpr int PIECES_AT = SLICES * B_SLICE;
  static constexpr int STAGE = (PIECES_AT + WARPGROUPS * SLICES * P::PIECE + 1023) / 1024 * 1024;
  static constexpr int BOX_TOKENS = BN < 64 ? BN : 64, BOX = BOX_TOKENS * SWIZZLE_ROW;
  static constexpr int BOXES_AT = STAGES * STAGE;
  static constexpr int BARRIERS_AT = BOXES_AT + WARPGROUPS * BOX;
  static constexpr int SHARED_BYTES = BARRIERS_AT + 2 * STAGES * 8;
  static_assert(SHARED_BYTES <= 227 * 1024);
};

template <class Shape>
struct PackedGemm {
  using P = typename Shape::P;

  const PackedGemmArgs& args;
  const uint8_t* const shared_pointer;
  const uint32_t shared;
  const int steps, stages, chunks, tiles;

  __device__ __forceinline__ PackedGemm(const PackedGemmArgs& args, const uint8_t* shared)
      : args(args),
        shared_pointer(shared),
        shared(shared_address(shared)),
        steps((args.k + RECORD_K - 1) / RECORD_K),
        stages((steps + Shape::SLICES - 1) / Shape::SLICES),
        chunks((args.tokens + Shape::BN - 1) / Shape::BN),
        tiles((args.outputs + Shape::BM - 1) / Shape::BM * chunks) {}

  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared + Shape::BARRIERS_AT + 8 * stage;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return full(stage) + 8 * Shape::STAGES;
  }

  // First output and token of a tile: neighbours in time share their weights.
  __device__ __forceinline__ int tile_output(int index) const { return index / chunks * Shape::BM; }
  __device__ __forceinline__ int tile_token(int index) const { return index % chunks * Shape::BN; }

  __device__ __forceinline__ int slices(int step) const {
    return min(Shape::SLICES, steps - step * Shape::SLICES);
  }

  // Pieces of the tile: a warpgroup behind the last output has none.
  __device__ __forceinline__ int pieces(int output) const {
    return min(Shape::WARPGROUPS, (args.outputs - output + PIECE_ROWS - 1) / PIECE_ROWS);
  }

  __device__ __forceinline__ void load_weights(int output, int step, int stage, uint64_t policy) const {
    const int count = slices(step), rows = pieces(output);
    const uint32_t bytes = count * P::PIECE;
    barrier_arrive_expect(full(stage), rows * bytes + count * Shape::B_SLICE);
    for (int i = 0; i < rows; i++) {
      const size_t piece = size_t(output / PIECE_ROWS + i) * steps + step * Shape::SLICES;
      const uint32_t to = shared + stage * Shape::STAGE + Shape::PIECES_AT + i * Shape::SLICES * P::PIECE;
      bulk_load(to, args.weights + piece * P::PIECE, bytes, full(stage), policy);
    }
  }

  __device__ __forceinline__ void load_tokens(int token, int step, int stage, uint64_t policy) const {
    for (int slice = 0; slice < slices(step); slice++) {
      const int k = (step * Shape::SLICES + slice) * SWIZZLE_K;
      tma_load(shared + stage * Shape::STAGE + slice * Shape::B_SLICE, args.x, k, token, full(stage),
               policy);
    }
  }

  // One thread. Weights are there before the previous kernel ends, so the first of them are under way
  // while it finishes.
  __device__ __forceinline__ void produce() const {
    // With few tokens each weight is read once, the tokens by every block.
    const uint64_t once = chunks == 1 ? l2_evict_first() : l2_evict_normal(), keep = l2_evict_last();
    int ahead = min(Shape::STAGES, stages), stage = 0;
    uint32_t parity = 0;
    for (int step = 0; step < ahead; step++) load_weights(tile_output(blockIdx.x), step, step, once);
    wait_for_previous();
    for (int step = 0; step < ahead; step++) {
      load_tokens(tile_token(blockIdx.x), step, step, keep);
    }
    if (ahead == Shape::STAGES) {
      parity ^= 1;
    } else {
      stage = ahead;
    }
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      for (int step = ahead; step < stages; step++) {
        barrier_wait(empty(stage), parity ^ 1);
        load_weights(tile_output(index), step, stage, once);
        load_tokens(tile_token(index), step, stage, keep);
        if (++stage == Shape::STAGES) {
          stage = 0;
          parity ^= 1;
        }
      }
      ahead = 0;
    }
  }

  // A position in the ring, as the consumers walk over it.
  struct Position {
    int stage = 0, previous = -1;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
      previous = stage;
      if (++stage == Shape::STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  __device__ __forceinline__ void release(int stage) const {
    if (stage >= 0 && threadIdx.x % 32 == 0) barrier_arrive(empty(stage));
  }

  // Unpacks a slice of the stage into `a` and queues its products.
  __device__ __forceinline__ void multiply(int stage, int slice, int warpgroup,
                                           uint32_t (&a)[STEPS][4],
                                           float (&acc)[Shape::BN / 2]) const {
    const int at = stage * Shape::STAGE, warp = threadIdx.x % 128 / 32;
    const int piece = at + Shape::PIECES_AT + (warpgroup * Shape::SLICES + slice) * P::PIECE;
    const PackedLane<P> weights(shared_pointer + piece + warp * P::RECORD, threadIdx.x % 32);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      weights.fragment(s, a[s]);
      wgmma_keep(a[s]);
    }
    const uint64_t b = wgmma_tile(shared + at + slice * Shape::B_SLICE);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      WgmmaRegisters<Shape::BN>::run(acc, a[s], b + s * WGMMA_NEXT_K);
    }
    wgmma_commit();
  }

  // Two slices in turn have each their own registers: when one's products are queued, those of the other have
  // ended. (Without branches between them, or the compiler waits for each.)
  __device__ __forceinline__ void consume(int warpgroup) const {
    float acc[Shape::BN / 2];
    uint32_t a[2][STEPS][4];
    Position at;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
#pragma unroll
      for (int i = 0; i < Shape::BN / 2; i++) acc[i] = 0.f;
      at.previous = -1;
      int left = steps;
      for (; left >= 2; left -= 2) {
        barrier_wait(full(at.stage), at.parity);
        multiply(at.stage, 0, warpgroup, a[0], acc);
        wgmma_wait<1>();
        release(at.previous);
        if (Shape::SLICES == 1) {
          at.advance();
          barrier_wait(full(at.stage), at.parity);
        }
        multiply(at.stage, Shape::SLICES - 1, warpgroup, a[1], acc);
        wgmma_wait<1>();
        if (Shape::SLICES == 1) release(at.previous);
        at.advance();
      }
      if (left > 0) {
        wgmma_wait<0>();
        release(at.previous);
        barrier_wait(full(at.stage), at.parity);
        multiply(at.stage, 0, warpgroup, a[0], acc);
        at.advance();
      }
      wgmma_wait<0>();
      release(at.previous);
      wgmma_keep(acc);
      store(warpgroup, tile_output(index) + warpgroup * PIECE_ROWS, tile_token(index), acc);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait<0>();
  }

  // Row and column in the warpgroup's tile of this thread's accumulator 0.
  static __device__ __forceinline__ int thread_row() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }
  static __device__ __forceinline__ int thread_column() { return threadIdx.x % 4 * 2; }

  __device__ __forceinline__ void store(int warpgroup, int output, int token,
                                        float (&acc)[Shape::BN / 2]) const {
    if (output >= args.outputs) return;
    if (args.bias != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = output + thread_row() + 8 * half;
        const float bias = row < args.outputs ? args.bias[row] : 0.f;
#pragma unroll
        for (int i = 0; i < Shape::BN / 8; i++) {
          acc[4 * i + 2 * half] += bias;
          acc[4 * i + 2 * half + 1] += bias;
        }
      }
    }
    if (args.out_f32 != nullptr) {
      store_f32(output, token, acc);
    } else {
      store_bf16(warpgroup, output, token, acc);
    }
  }

  __device__ __forceinline__ void store_f32(int output, int token,
                                            float (&acc)[Shape::BN / 2]) const {
#pragma unroll
    for (int i = 0; i < Shape::BN / 2; i++) {
      const int row = output + thread_row() + i / 2 % 2 * 8;
      const int column = token + thread_column() + i / 4 * 8 + i % 2;
      if (row < args.outputs && column < args.tokens) {
        args.out_f32[size_t(column) * args.stride + row] = acc[i];
      }
    }
  }

  // Transposed: rows of a box are tokens.
  __device__ __forceinline__ void store_bf16(int warpgroup, int output, int token,
                                             float (&acc)[Shape::BN / 2]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const uint32_t box = shared + Shape::BOXES_AT + warpgroup * Shape::BOX;
    const uint32_t piece = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int first = 0; first < Shape::BN; first += Shape::BOX_TOKENS) {
      if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
      warpgroup_barrier(warpgroup);
#pragma unroll
      for (int j = 0; j < Shape::BOX_TOKENS / 8; j++) {
        const int row = 8 * j + lane % 8;
        const float* from = acc + 4 * (first / 8 + j);
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                         box + row * SWIZZLE_ROW + (piece ^ (row % 8)) * 16),
                     "r"(pack_bf16(from[0], from[1])), "r"(pack_bf16(from[2], from[3]))
                     : "memory");
      }
      shared_to_async_fence();
      warpgroup_barrier(warpgroup);
      if (threadIdx.x % 128 == 0) {
        tma_store(args.out, output, token + first, box);
        tma_store_commit();
      }
    }
  }

  __device__ __forceinline__ void run() const {
    const int warpgroup = threadIdx.x / 128;
    if (threadIdx.x == 0) {
      tma_prefetch(args.x);
      for (int stage = 0; stage < Shape::STAGES; stage++) {
        barrier_init(full(stage), 1);
        barrier_init(empty(stage), 4 * Shape::WARPGROUPS);
      }
      barrier_init_fence();
    }
    __syncthreads();
    let_next_start();
    if (warpgroup == Shape::WARPGROUPS) {
      if (Shape::TRADE_REGISTERS) registers_decrease<24>();
      if (threadIdx.x == 128 * Shape::WARPGROUPS && blockIdx.x < tiles) produce();
    } else {
      if (Shape::TRADE_REGISTERS) registers_increase<240>();
      consume(warpgroup);
    }
  }
};

#define GEMM(NAME, WARPGROUPS, BN, SLICES, STAGES, BLOCKS, ...)                                      \
  using shape_##NAME##_##BN##x##WARPGROUPS =                                                         \
      PackedShape<Packed<__VA_ARGS__>, WARPGROUPS, BN, SLICES, STAGES>;                              \
  extern "C" __global__ void __launch_bounds__(shape_##NAME##_##BN##x##WARPGROUPS::THREADS, BLOCKS) \
      gemm_packed_##NAME##_##BN##x##WARPGROUPS(const __grid_constant__ PackedGemmArgs args) {        \
    extern __shared__ __align__(1024) uint8_t dynamic_shared[];                                      \
    PackedGemm<shape_##NAME##_##BN##x##WARPGROUPS>(args, dynamic_shared).run();                      \
  }

// Tokens x warpgroups. Up to 64 tokens two blocks share an SM.
#define GEMMS(NAME, ...)                \
  GEMM(NAME, 1, 16, 2, 6, 2, __VA_ARGS__) \
  GEMM(NAME, 1, 64, 2, 4, 2, __VA_ARGS__) \
  GEMM(NAME, 2, 64, 1, 5, 2, __VA_ARGS__) \
  GEMM(NAME, 2, 128, 1, 7, 1, __VA_ARGS__) \
  GEMM(NAME, 2, 256, 1, 5, 1, __VA_ARGS__)

GEMMS(4, 4, 32, 8)
GEMMS(4_min, 4, 32, 0)
GEMMS(5, 5, 32, 16)
GEMMS(5_min, 5, 32, 0)
GEMMS(6, 6, 16, 32)
GEMMS(8, 8, 32, 128)
