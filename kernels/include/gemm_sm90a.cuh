// The body of the bfloat16 matrix products on Hopper: out = A B^T with A[rows_a, k] and B[rows_b, k].
//
// A persistent grid of clusters walks over the output tiles. In each block one thread of the last
// warp, the producer, streams 64-wide slices of A and B through a ring of shared-memory stages with
// TMA; WARPGROUPS warpgroups consume them with wgmma, 64 rows of A each and all BN rows of B. The
// blocks of a cluster take neighbouring tiles along A and share their B tile: each loads a part of
// it for all.
//
// Every output element is one float32 accumulator to which wgmma adds the products of 16 consecutive
// k at a time, in the order of k: no split along k. Neither the tile, nor which operand is A, nor the
// number of rows changes its bits. (Seen on the H100: mma.sync gives the same bits, too.)
//
// The weights of a gate: rows are gates, then as many ups, and out = activation(x gate^T) * (x up^T), both
// rounded to bfloat16 before, as act_mul.cu finds them. TMA brings 8 rows of gates and 8 of ups in turn to
// shared memory, so that a thread's accumulators hold what belongs together.
//
// TMA takes longer to write the zeros of rows out of range than to read rows. So the last tile of a side
// is moved back over the one before and computes some rows once more, with the same bits; and where one tile
// has room for all rows, only these are read. What is left of the tile is of no consequence: it ends up in
// outputs that TMA doesn't write.
//
// What bounds a step of 64 k, in cycles: the tensor cores, WARPGROUPS BN 2; shared memory at 128 bytes a
// cycle, WARPGROUPS (64 + BN) for wgmma to read and BM + BN for TMA to write. 128 x 256: 1024, 1024;
// 128 x 192: 768, 832; 128 x 128: 512, 640; 64 x 128: 256, 384.
#pragma once

#include "activation.cuh"
#include "ptx.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "wgmma.cuh"

// Which of the two operands is the weights, and which the activations.
enum class Weights { A, B };

// What is done to gates, if the weights have some.
enum class Gate : int { NONE, SILU, GELU };

struct GemmArgs {
  // With gates that of the weights has four dimensions: k, 8 rows, gate and up, groups of 8 rows.
  TensorMap a, b;
  // bfloat16 output; unused when `out_f32` is given.
  TensorMap out;
  // float32 output, `stride` elements from a token to the next, or null.
  float* out_f32;
  // Added to each token's outputs, or null.
  const float* bias;
  int rows_a, rows_b, k;
  // Tiles along A that are done together before the next tile along B: they meet in L2.
  int group;
  int stride;
  Gate gate;
};

template <Weights WEIGHTS_, int WARPGROUPS_, int BN_, int SLICES_, int STAGES_, int CLUSTER_>
struct GemmShape {
  static constexpr Weights WEIGHTS = WEIGHTS_;
  static constexpr int WARPGROUPS = WARPGROUPS_, BN = BN_, SLICES = SLICES_, STAGES = STAGES_,
                       CLUSTER = CLUSTER_;
  static constexpr int BM = 64 * WARPGROUPS;
  // Only where the accumulators leave a thread short of registers is the producer a whole
  // warpgroup that gives up its own.
  static constexpr bool TRADE_REGISTERS = WARPGROUPS * BN > 256;
  static constexpr int PRODUCER_THREADS = TRADE_REGISTERS ? 128 : 32;
  static constexpr int THREADS = 128 * WARPGROUPS + PRODUCER_THREADS;

  static constexpr int BK = SLICES * SWIZZLE_K;
  static constexpr int A_SLICE = BM * SWIZZLE_ROW, B_SLICE = BN * SWIZZLE_ROW;
  static constexpr int STAGE = SLICES * (A_SLICE + B_SLICE);
  // Output goes through shared memory in boxes of 64 outputs, or 32 where 64 don't divide BN, times a
  // number of tokens. A row of a box is as long as its swizzle pattern: 128 or 64 bytes.
  // With gates half as many outputs.
  static constexpr int box_outputs(int outputs) {
    return outputs % 64 == 0 ? 64 : outputs % 32 == 0 ? 32 : 16;
  }
  static constexpr int BOX_OUTPUTS = WEIGHTS == Weights::A ? 64 : box_outputs(BN);
  static constexpr int GATED_OUTPUTS = WEIGHTS == Weights::A ? 32 : box_outputs(BN / 2);
  // All of a few tokens, otherwise a half or a quarter of them.
  static constexpr int BOX_TOKENS = WEIGHTS == Weights::B ? 64
                                    : BN <= 64 || BN % 16 ? BN
                                    : BN <= 128 || BN % 32 ? BN / 2
                                                           : BN / 4;
  static constexpr int BOX = BOX_TOKENS * 2 * BOX_OUTPUTS;
  static constexpr int BOXES_AT = STAGES * STAGE;
  static constexpr int shared_bytes(int boxes) {
    return BOXES_AT + WARPGROUPS * boxes * BOX + 2 * STAGES * 8;
  }
  // Two where there is room for them, unless one holds all.
  static constexpr int LIMIT = 227 * 1024;
  static constexpr int BOXES =
      (WEIGHTS == Weights::A && BOX_TOKENS == BN) || shared_bytes(2) > LIMIT ? 1 : 2;
  static constexpr int BARRIERS_AT = BOXES_AT + WARPGROUPS * BOXES * BOX;
  static_assert(shared_bytes(BOXES) <= LIMIT);
  static_assert(B_SLICE / CLUSTER % 1024 == 0, "a block's part of B ends inside a swizzle pattern");
  static_assert(WEIGHTS == Weights::A || (BN % 32 == 0 && BN / CLUSTER % 16 == 0),
                "a block loads gates and ups in turn");
};

// Of the weights of a gate: 8 gates and 8 ups in turn, from row `row` of these on, a multiple of 16.
__device__ __forceinline__ void tma_load_gates(uint32_t to, const TensorMap& map, int k, int row,
                                               uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(k), "r"(0), "r"(row / 16), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void tma_load_gates_multicast(uint32_t to, const TensorMap& map, int k, int row,
                                                         uint32_t barrier, uint16_t mask,
                                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %4, %5}], [%2], %6, %7;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(k), "r"(0), "r"(row / 16), "h"(mask), "l"(policy)
      : "memory");
}

// A position in the ring: the same sequence of positions is walked by producer and consumers.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <class Shape>
struct Gemm {
  const GemmArgs& args;
  const uint32_t shared;  // start of dynamic shared memory
  const int tiles_a, tiles_b, steps;

  __device__ __forceinline__ Gemm(const GemmArgs& args, uint32_t shared)
      : args(args),
        shared(shared),
        tiles_a(divide_up(args.rows_a, Shape::BM * Shape::CLUSTER)),
        tiles_b(divide_up(args.rows_b, Shape::BN)),
        steps(divide_up(args.k, Shape::BK)) {}

  static __device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared + Shape::BARRIERS_AT + 8 * stage;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return full(stage) + 8 * Shape::STAGES;
  }
  __device__ __forceinline__ uint32_t a_slice(int stage, int slice) const {
    return shared + stage * Shape::STAGE + slice * Shape::A_SLICE;
  }
  __device__ __forceinline__ uint32_t b_slice(int stage, int slice) const {
    return a_slice(stage, Shape::SLICES) + slice * Shape::B_SLICE;
  }

  // First rows of the tile, for this block.
  struct Tile {
    int a, b;
  };

  // A tile of A wholly out of range, which the cluster's last block can get, is not loaded.
  __device__ __forceinline__ uint32_t stage_bytes(const Tile& tile) const {
    const int a = has_a(tile) ? min(Shape::BM, args.rows_a) : 0;
    const int b = Shape::CLUSTER == 1 ? min(Shape::BN, args.rows_b) : Shape::BN;
    return Shape::SLICES * SWIZZLE_ROW * (a + b);
  }
  __device__ __forceinline__ bool has_a(const Tile& tile) const {
    return Shape::CLUSTER == 1 || tile.a < args.rows_a;
  }

  __device__ __forceinline__ Tile tile(int index) const {
    const int per_group = args.group * tiles_b, first = index / per_group * args.group;
    const int rows = min(args.group, tiles_a - first), rest = index % per_group;
    const int a = first + rest % rows, b = rest / rows;
    return {inside((a * Shape::CLUSTER + rank()) * Shape::BM, Shape::BM, args.rows_a),
            inside(b * Shape::BN, Shape::BN, args.rows_b)};
  }

  // Moves a tile that begins in range, but does not end there.
  static __device__ __forceinline__ int inside(int start, int size, int rows) {
    return start < rows ? max(0, min(start, rows - size)) : start;
  }

  static __device__ __forceinline__ int rank() {
    return Shape::CLUSTER == 1 ? 0 : static_cast<int>(cluster_rank());
  }

  __device__ __forceinline__ int tiles() const { return tiles_a * tiles_b; }
  __device__ __forceinline__ int first_tile() const { return blockIdx.x / Shape::CLUSTER; }
  __device__ __forceinline__ int tile_stride() const { return gridDim.x / Shape::CLUSTER; }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < Shape::STAGES; stage++) {
      barrier_init(full(stage), 1);
      // Each consumer warp of each block that this block's part of B goes to.
      barrier_init(empty(stage), 4 * Shape::WARPGROUPS * Shape::CLUSTER);
    }
    barrier_init_fence();
  }

  // Whether this operand has gates.
  __device__ __forceinline__ bool gates(Weights operand) const {
    return Shape::WEIGHTS == operand && args.gate != Gate::NONE;
  }

  __device__ __forceinline__ void load_a(const Tile& tile, int step, int stage,
                                         uint64_t policy) const {
    if (!has_a(tile)) return;
#pragma unroll
    for (int slice = 0; slice < Shape::SLICES; slice++) {
      const int k = step * Shape::BK + slice * SWIZZLE_K;
      if (gates(Weights::A)) {
        tma_load_gates(a_slice(stage, slice), args.a, k, tile.a, full(stage), policy);
      } else {
        tma_load(a_slice(stage, slice), args.a, k, tile.a, full(stage), policy);
      }
    }
  }

  __device__ __forceinline__ void load_b(const Tile& tile, int step, int stage,
                                         uint64_t policy) const {
#pragma unroll
    for (int slice = 0; slice < Shape::SLICES; slice++) {
      const int k = step * Shape::BK + slice * SWIZZLE_K;
      constexpr int ROWS = Shape::BN / Shape::CLUSTER, ALL = (1 << Shape::CLUSTER) - 1;
      const int row = rank() * ROWS;
      const uint32_t to = b_slice(stage, slice) + row * SWIZZLE_ROW;
      if (Shape::CLUSTER == 1 && gates(Weights::B)) {
        tma_load_gates(to, args.b, k, tile.b, full(stage), policy);
      } else if (Shape::CLUSTER == 1) {
        tma_load(to, args.b, k, tile.b, full(stage), policy);
      } else if (gates(Weights::B)) {
        tma_load_gates_multicast(to, args.b, k, tile.b + row, full(stage), ALL, policy);
      } else {
        tma_load_multicast(to, args.b, k, tile.b + row, full(stage), ALL, policy);
      }
    }
  }

  // One thread. Weights are there before the previous kernel ends, so the first of them are under way
  // while it finishes.
  __device__ __forceinline__ void produce() const {
    constexpr bool WEIGHTS_ARE_A = Shape::WEIGHTS == Weights::A;
    // Few tokens: each weight is read once, the tokens by every block.
    const uint64_t once = WEIGHTS_ARE_A ? l2_evict_first() : l2_evict_normal();
    const uint64_t keep = WEIGHTS_ARE_A ? l2_evict_last() : l2_evict_normal();
    RingPosition<Shape::STAGES> ring;
    int ahead = min(Shape::STAGES, steps);
    const Tile first = tile(first_tile());
    for (int step = 0; step < ahead; step++) {
      barrier_arrive_expect(full(step), stage_bytes(first));
      WEIGHTS_ARE_A ? load_a(first, step, step, once) : load_b(first, step, step, once);
    }
    wait_for_previous();
    for (int step = 0; step < ahead; step++) {
      WEIGHTS_ARE_A ? load_b(first, step, step, keep) : load_a(first, step, step, keep);
      ring.advance();
    }
    for (int index = first_tile(); index < tiles(); index += tile_stride()) {
      const Tile here = tile(index);
      for (int step = ahead; step < steps; step++) {
        barrier_wait(empty(ring.stage), ring.parity ^ 1);
        barrier_arrive_expect(full(ring.stage), stage_bytes(here));
        load_a(here, step, ring.stage, once);
        load_b(here, step, ring.stage, keep);
        ring.advance();
      }
      ahead = 0;
    }
  }

  __device__ __forceinline__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    if (Shape::CLUSTER == 1) {
      if (lane == 0) barrier_arrive(empty(stage));
    } else if (lane < Shape::CLUSTER) {
      barrier_arrive_remote(empty(stage), lane);
    }
  }

  __device__ __forceinline__ void multiply(int warpgroup, int stage, bool first,
                                           float (&acc)[Shape::BN / 2]) const {
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < Shape::SLICES; slice++) {
      const uint64_t a = wgmma_tile(a_slice(stage, slice) + warpgroup * 64 * SWIZZLE_ROW);
      const uint64_t b = wgmma_tile(b_slice(stage, slice));
#pragma unroll
      for (int i = 0; i < SWIZZLE_K / WGMMA_K; i++) {
        Wgmma<Shape::BN>::run(acc, a + i * WGMMA_NEXT_K, b + i * WGMMA_NEXT_K,
                              !first || slice + i > 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void consume(int warpgroup) const {
    RingPosition<Shape::STAGES> ring;
    float acc[Shape::BN / 2];
    for (int index = first_tile(); index < tiles(); index += tile_stride()) {
      int previous = -1;
      for (int step = 0; step < steps; step++) {
        barrier_wait(full(ring.stage), ring.parity);
        multiply(warpgroup, ring.stage, step == 0, acc);
        // The next step is queued before this one has ended: the tensor cores never wait.
        wgmma_wait<1>();
        if (previous >= 0) release(previous);
        previous = ring.stage;
        ring.advance();
      }
      wgmma_wait<0>();
      release(previous);
      wgmma_keep(acc);
      store(warpgroup, tile(index), acc);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait<0>();
  }

  __device__ __forceinline__ void store(int warpgroup, Tile here,
                                        float (&acc)[Shape::BN / 2]) const {
    here.a += 64 * warpgroup;
    if (args.bias != nullptr) add_bias(here, acc);
    if (gates(Shape::WEIGHTS)) {
      args.gate == Gate::SILU ? apply_gates<silu>(acc) : apply_gates<gelu_tanh>(acc);
      if (Shape::WEIGHTS == Weights::A) {
        store_transposed<Shape::GATED_OUTPUTS>(warpgroup, {here.a / 2, here.b}, acc);
      } else {
        store_boxes<Shape::BN / 2, Shape::GATED_OUTPUTS>(warpgroup, {here.a, here.b / 2}, acc);
      }
    } else if (args.out_f32 != nullptr) {
      store_f32(here, acc);
    } else if (Shape::WEIGHTS == Weights::A) {
      store_transposed<Shape::BOX_OUTPUTS>(warpgroup, here, acc);
    } else {
      store_boxes<Shape::BN, Shape::BOX_OUTPUTS>(warpgroup, here, acc);
    }
  }

  // To the first half of the accumulators. Gates are in those of row 0 of A and ups in those of row 8, or
  // they are in the even and the odd groups of 8 columns of B.
  template <float (*ACTIVATION)(float)>
  static __device__ __forceinline__ void apply_gates(float (&acc)[Shape::BN / 2]) {
    constexpr int AHEAD = Shape::WEIGHTS == Weights::A ? 2 : 4;
#pragma unroll
    for (int i = 0; i < Shape::BN / 4; i += 2) {
      const int from = i / AHEAD * 2 * AHEAD + i % AHEAD;
      const uint32_t gates = pack_bf16(acc[from], acc[from + 1]);
      const uint32_t ups = pack_bf16(acc[from + AHEAD], acc[from + AHEAD + 1]);
      acc[i] = ACTIVATION(__uint_as_float(gates << 16)) * __uint_as_float(ups << 16);
      acc[i + 1] = ACTIVATION(__uint_as_float(gates & 0xffff0000u)) * __uint_as_float(ups & 0xffff0000u);
    }
  }

  // Row and column in the warpgroup's 64 x BN tile of this thread's accumulator 0.
  static __device__ __forceinline__ int thread_row() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }
  static __device__ __forceinline__ int thread_column() { return threadIdx.x % 4 * 2; }

  __device__ __forceinline__ void add_bias(const Tile& here, float (&acc)[Shape::BN / 2]) const {
    const bool by_row = Shape::WEIGHTS == Weights::A;
    const int outputs = by_row ? args.rows_a : args.rows_b;
    const int first = by_row ? here.a + thread_row() : here.b + thread_column();
#pragma unroll
    for (int i = 0; i < Shape::BN / 2; i++) {
      const int output = first + (by_row ? i / 2 % 2 * 8 : i / 4 * 8 + i % 2);
      if (output >= outputs) continue;
      const int pair = output / 16 * 8 + output % 8, half = output / 8 % 2 * (outputs / 2);
      acc[i] += args.bias[gates(Shape::WEIGHTS) ? pair + half : output];
    }
  }

  __device__ __forceinline__ void store_f32(const Tile& here, float (&acc)[Shape::BN / 2]) const {
    const int row = here.a + thread_row(), column = here.b + thread_column();
#pragma unroll
    for (int i = 0; i < Shape::BN / 2; i++) {
      const int r = row + i / 2 % 2 * 8, c = column + i / 4 * 8 + i % 2;
      if (r >= args.rows_a || c >= args.rows_b) continue;
      if (Shape::WEIGHTS == Weights::A) {
        args.out_f32[size_t(c) * args.stride + r] = acc[i];
      } else {
        args.out_f32[size_t(r) * args.stride + c] = acc[i];
      }
    }
  }

  // Byte offset of the 16-byte piece `piece` of row `row` in a box of OUTPUTS: the number of the 128-byte
  // line, modulo the pieces of a row, is added without carry to the piece's.
  template <int OUTPUTS>
  static __device__ __forceinline__ uint32_t swizzled(int row, int piece) {
    constexpr int PIECES = OUTPUTS / 8, LINE = 64 / OUTPUTS;
    return row * 2 * OUTPUTS + ((piece ^ (row / LINE % PIECES)) * 16);
  }

  // Accumulators 8 i .. 8 i + 7 of a warp are four 8 x 8 matrices, rows 0 and 8 at columns 16 i and
  // 16 i + 8; lane l gives the address of row l % 8 of matrix l / 8.
  static __device__ __forceinline__ void store_matrices(uint32_t to, const float* acc) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(pack_bf16(acc[0], acc[1])), "r"(pack_bf16(acc[2], acc[3])),
                 "r"(pack_bf16(acc[4], acc[5])), "r"(pack_bf16(acc[6], acc[7]))
                 : "memory");
  }

  // Two 8 x 8 matrices, rows 0 and 8 of accumulators 4 j .. 4 j + 3, each transposed.
  static __device__ __forceinline__ void store_matrices_transposed(uint32_t to, const float* acc) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
                 "r"(pack_bf16(acc[0], acc[1])), "r"(pack_bf16(acc[2], acc[3]))
                 : "memory");
  }

  static __device__ __forceinline__ void store_matrix_transposed(uint32_t to, const float* acc) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to),
                 "r"(pack_bf16(acc[0], acc[1]))
                 : "memory");
  }

  __device__ __forceinline__ uint32_t box(int warpgroup, int index) const {
    return shared + Shape::BOXES_AT + (warpgroup * Shape::BOXES + index) * Shape::BOX;
  }

  // Waits until the box can be written: two are in flight, if there are two.
  static __device__ __forceinline__ void open_box(int warpgroup) {
    if (threadIdx.x % 128 == 0) tma_store_wait_read<Shape::BOXES - 1>();
    warpgroup_barrier(warpgroup);
  }

  __device__ __forceinline__ void send_box(int warpgroup, uint32_t box, int output, int token) const {
    shared_to_async_fence();
    warpgroup_barrier(warpgroup);
    if (threadIdx.x % 128 == 0) {
      tma_store(args.out, output, token, box);
      tma_store_commit();
    }
  }

  // Tokens are rows: boxes of 64 tokens times OUTPUTS of COLUMNS outputs.
  template <int COLUMNS, int OUTPUTS>
  __device__ __forceinline__ void store_boxes(int warpgroup, const Tile& here,
                                              float (&acc)[Shape::BN / 2]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int column = 0; column < COLUMNS; column += OUTPUTS) {
      const uint32_t to = box(warpgroup, column / OUTPUTS % Shape::BOXES);
      open_box(warpgroup);
#pragma unroll
      for (int i = 0; i < OUTPUTS / 16; i++) {
        store_matrices(to + swizzled<OUTPUTS>(row, 2 * i + lane / 16), acc + column / 2 + 8 * i);
      }
      send_box(warpgroup, to, here.b + column, here.a);
    }
  }

  // Tokens are columns: boxes of OUTPUTS outputs, 64 or with gates 32, times some of the tokens.
  template <int OUTPUTS>
  __device__ __forceinline__ void store_transposed(int warpgroup, const Tile& here,
                                                   float (&acc)[Shape::BN / 2]) const {
    constexpr int TOKENS = Shape::BOX_TOKENS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int token = 0; token < Shape::BN; token += TOKENS) {
      const uint32_t to = box(warpgroup, token / TOKENS % Shape::BOXES);
      open_box(warpgroup);
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++) {
        const int row = 8 * j + lane % 8, at = token / 8 + j;
        if (OUTPUTS == 64) {
          store_matrices_transposed(to + swizzled<64>(row, 2 * warp + lane / 8 % 2), acc + 4 * at);
        } else {
          store_matrix_transposed(to + swizzled<OUTPUTS>(row, warp), acc + 2 * at);
        }
      }
      send_box(warpgroup, to, here.a, here.b + token);
    }
  }
};

template <class Shape>
__device__ __forceinline__ void gemm(const GemmArgs& args) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  const Gemm<Shape> gemm(args, shared_address(dynamic_shared));
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    tma_prefetch(args.a);
    tma_prefetch(args.b);
    gemm.init_barriers();
  }
  if (Shape::CLUSTER == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  let_next_start();

  if (warpgroup == Shape::WARPGROUPS) {
    if (Shape::TRADE_REGISTERS) registers_decrease<24>();
    if (threadIdx.x % Shape::PRODUCER_THREADS == 0 && gemm.first_tile() < gemm.tiles()) {
      gemm.produce();
    }
  } else {
    if (Shape::TRADE_REGISTERS) registers_increase<240>();
    gemm.consume(warpgroup);
  }
  // No block of a cluster may go while another still signals its barriers.
  if (Shape::CLUSTER > 1) {
    __syncwarp();
    cluster_sync();
  }
}
