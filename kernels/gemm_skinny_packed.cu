// out[tokens, outputs] = x[tokens, k] w[outputs, k]^T (+ bias) with w in records (include/packed.cuh). For
// few tokens; on any GPU since Ampere.
//
// x     bf16, row-major;  out  bf16 or, when `out_f32` is given, f32, `stride` elements from a token to
//       the next;  bias  f32 or null
// k     a multiple of 32
//
// Each warp takes 16 outputs and at most 64 tokens (8); the warps of a block share the tokens. Records and
// the tokens' columns that belong to them stream through a ring of DEPTH stages in shared memory. A
// warp turns its record into A fragments of mma in registers; tokens are the columns of B, in rows of
// 128 bytes in which the 16-byte piece c of row r lies at piece c ^ (r % 8), without bank conflicts.
// Weights are rounded to bfloat16 and added up as gemm_bf16.cu does it: by the same instruction, in the
// order of k. On Hopper wgmma gives the same bits, too.
//
// Launch: blocks of up to 4 warps (at most 8 tokens: _8) or 8 warps (_64); any number of blocks up to
// ceil(outputs / 16 / warps) ceil(tokens / 64); DEPTH (warps RECORD + 128 (tokens, at most 64, rounded up
// to 8 or 16)) bytes of shared memory.
// Roofline: the records' bytes. A weight costs about 4.5 instructions of a lane: at 132 SMs and
// 1.7 GHz that allows 6e12 weights/s, and memory brings 5.5e12 of 4.5 bits in 3.1 TB.
#include "mma.cuh"
#include "packed.cuh"
#include "ptx.cuh"

struct Args {
  const bf16* x;
  const uint8_t* weights;
  bf16* out;
  float* out_f32;
  const float* bias;
  int tokens, outputs, k, stride;
};

constexpr int TOKEN_ROW = RECORD_K * 2, TOKEN_PIECES = RECORD_K / VEC;

// At most 8 TILES tokens at a time. A stage has the records of all warps, then the tokens.
template <class P, int TILES, int DEPTH>
struct Gemm {
  static constexpr int TOKENS = 8 * TILES, ROUND = TILES == 1 ? 8 : 16;

  const Args& args;
  const uint32_t ring;
  const uint8_t* const ring_pointer;
  const int warps, warp, lane, steps, blocks, chunks;
  const uint32_t stage_bytes;
  // What this thread copies of the tokens: of every `token_stride`th row, one piece.
  const int row, piece, row_stride;
  int first_token, tokens;  // of this chunk
  float acc[TILES][4];

  __device__ __forceinline__ Gemm(const Args& args, const uint8_t* shared)
      : args(args),
        ring(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        ring_pointer(shared),
        warps(blockDim.x / 32),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        steps((args.k + RECORD_K - 1) / RECORD_K),
        blocks((args.outputs + RECORD_ROWS - 1) / RECORD_ROWS),
        chunks((args.tokens + TOKENS - 1) / TOKENS),
        stage_bytes(warps * P::RECORD +
                    (min(args.tokens, TOKENS) + ROUND - 1) / ROUND * ROUND * TOKEN_ROW),
        row(threadIdx.x / TOKEN_PIECES),
        piece(threadIdx.x % TOKEN_PIECES),
        row_stride(blockDim.x / TOKEN_PIECES) {}

  // Stages are named by their offset in the ring.
  __device__ __forceinline__ void advance(uint32_t& stage) const {
    stage += stage_bytes;
    if (stage == DEPTH * stage_bytes) stage = 0;
  }

  __device__ __forceinline__ void load_record(const uint8_t* from, uint32_t stage) const {
    const uint32_t to = ring + stage + warp * P::RECORD;
#pragma unroll
    for (int start = 0; start < P::RECORD; start += 512) {
      const int at = start + 16 * lane;
      if (start + 512 <= P::RECORD || at < P::RECORD) copy_async(to + at, from + at, true);
    }
  }

  static __device__ __forceinline__ int place(int row, int piece) {
    return row * TOKEN_ROW + (piece ^ (row % 8)) * 16;
  }

  // Where k has ended there must be zeros: the weights there are zero, too, but zero times what
  // happens to lie in memory may be no number.
  __device__ __forceinline__ void load_tokens(int step, uint32_t stage) const {
    const int column = step * RECORD_K + piece * VEC;
    const bool valid = column < args.k;
    const bf16* from = args.x + (valid ? size_t(first_token + row) * args.k + column : 0);
    const uint32_t to = ring + stage + warps * P::RECORD;
    for (int r = row; r < tokens; r += row_stride) {
      copy_async(to + place(r, piece), from, valid);
      if (valid) from += size_t(row_stride) * args.k;
    }
  }

  __device__ __forceinline__ void multiply(uint32_t stage) {
    const PackedLane<P> weights(ring_pointer + stage + warp * P::RECORD, lane);
    const uint32_t b = ring + stage + warps * P::RECORD;
    uint32_t columns[4];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      uint32_t a[4];
      weights.fragment(s, a);
      if constexpr (TILES == 1) {
        // Of 8 tokens, two steps at once.
        if (s % 2 == 0) load_matrices(columns, b + place(lane % 8, 2 * s + lane / 8));
        mma_bf16(acc[0], a, columns[s % 2 * 2], columns[s % 2 * 2 + 1]);
      } else {
#pragma unroll
        for (int pair = 0; pair < TILES / 2; pair++) {
          if (16 * pair >= tokens) break;
          const int r = 16 * pair + lane / 16 * 8 + lane % 8;
          load_matrices(columns, b + place(r, 2 * s + lane / 8 % 2));
          mma_bf16(acc[2 * pair], a, columns[0], columns[1]);
          mma_bf16(acc[2 * pair + 1], a, columns[2], columns[3]);
        }
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
        if (token >= tokens || output >= args.outputs) continue;
        const float value = acc[tile][i] + (args.bias ? args.bias[output] : 0.f);
        const size_t to = size_t(first_token + token) * args.stride + output;
        if (args.out_f32) {
          args.out_f32[to] = value;
        } else {
          args.out[to] = to_bf16(value);
        }
      }
    }
  }

  __device__ __forceinline__ void tile(int first_block, bool started) {
    // A warp without outputs repeats the last ones and doesn't store them.
    const int block = min(first_block + warp, blocks - 1);
    constexpr int NEXT = P::PIECE;
    const uint8_t* record = args.weights + record_index(block, 0, steps) * P::RECORD;
    const int ahead = min(DEPTH - 1, steps);
    for (int step = 0; step < ahead; step++) {
      load_record(record + size_t(step) * NEXT, step * stage_bytes);
    }
    // Weights were under way before the previous kernel ended.
    if (!started) wait_for_previous();
    for (int step = 0; step < DEPTH - 1; step++) {
      if (step < steps) load_tokens(step, step * stage_bytes);
      copy_async_commit();
    }
    record += size_t(DEPTH - 1) * NEXT;
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) (&acc[0][0])[i] = 0.f;
    uint32_t read = 0, write = (DEPTH - 1) * stage_bytes;
    for (int step = 0; step < steps; step++) {
      copy_async_wait<DEPTH - 2>();
      __syncthreads();
      if (step + DEPTH - 1 < steps) {
        load_record(record, write);
        load_tokens(step + DEPTH - 1, write);
        record += NEXT;
      }
      copy_async_commit();
      multiply(read);
      advance(read);
      advance(write);
    }
    if (first_block + warp < blocks) store(block);
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    const int groups = (blocks + warps - 1) / warps;
    // Neighbours in time share their weights.
    for (int i = blockIdx.x; i < groups * chunks; i += gridDim.x) {
      first_token = i % chunks * TOKENS;
      tokens = min(TOKENS, args.tokens - first_token);
      tile(i / chunks * warps, i != blockIdx.x);
    }
  }
};

// Deep enough for few warps on an SM, or shallow enough that two blocks of many tokens fit.
#define GEMM(NAME, TOKENS, WARPS, DEPTH, ...)                                          \
  extern "C" __global__ void __launch_bounds__(32 * WARPS)                             \
      gemm_packed_##NAME##_##TOKENS(const Args args) {                                 \
    extern __shared__ __align__(128) uint8_t dynamic_shared[];                         \
    let_next_start();                                                                  \
    Gemm<Packed<__VA_ARGS__>, TOKENS / 8, DEPTH>(args, dynamic_shared).run();          \
  }

#define GEMMS(NAME, ...)           \
  GEMM(NAME, 8, 4, 16, __VA_ARGS__) \
  GEMM(NAME, 64, 8, 6, __VA_ARGS__)

GEMMS(4, 4, 32, 8)
GEMMS(4_min, 4, 32, 0)
GEMMS(5, 5, 32, 16)
GEMMS(5_min, 5, 32, 0)
GEMMS(6, 6, 16, 32)
GEMMS(8, 8, 32, 128)
