// What the attention kernels share: how the host describes a step, the online softmax (Milakov &
// Gimelshein 2018; Dao 2023) and the merging of partial results.
//
// A query row is a (token, query head) pair of one key/value head: row r of a sequence is token
// r / group, head r % group. A row's arithmetic is its own: it meets tiles of positions that are cut at
// fixed positions, in order; tiles that it doesn't see but a neighbour does leave its bits alone,
// because e^-inf is 0 and e^0 is 1.
#pragma once

#include "kv.cuh"
#include "types.cuh"

// A unit of work, for each key/value head: a tile of a sequence's query rows; or, of sequences with one query
// each, a split of the positions that these see. Sequences share the work of a split whose blocks are the same
// if all of them see all of it.
struct Work {
  uint32_t token;     // the sequence's first token in the step; of a split, its first sharer in `sharers`
  uint32_t tokens;    // how many of the step's tokens are the sequence's; how many share the split
  uint32_t position;  // of the first; the sharer's, or of several the last of the split
  uint32_t table;     // where the sequence's block table begins in `tables`; of several, anyone's
  uint32_t part;      // which tile, or which split
};

// A sequence with one query, in the work of one of its splits.
struct Sharer {
  uint32_t token;     // in the step
  uint32_t position;  // of that token
  uint32_t slot;      // of the partial result of the sequence's first split; those of the others follow
};

struct AttentionArgs {
  const bf16* q;  // queries of token 0; a head's elements lie together, a token's heads one after another
  bf16* out;      // [tokens, heads * head_dim]
  const uint8_t* cache;
  const uint32_t* tables;  // block ids
  const Work* work;
  // How much work there is, and (to the Hopper kernels) how many blocks may do it: on the device, so that a
  // captured graph can vary them.
  const uint32_t* works;
  // Of decoding: who shares works; partial results, one slot per sequence, split and key/value head; counters,
  // zero before and after.
  const Sharer* sharers;
  float* partial_out;   // [slots, group, head_dim]
  float2* partial_sum;  // [slots, group]: scaled maximum and sum, see Weights::row
  uint32_t* counters;   // [slots, ceil(group / 16)]
  uint32_t* queue;      // on Hopper: works taken, blocks ended; zero before and after
  KvShape shape;
  uint32_t layer;
  uint32_t q_stride;  // elements from token to token in q
  uint32_t group;     // query heads per key/value head
  uint32_t window;    // a query sees that many positions up to its own; less than 2^31
  float scale;        // of scores, times log2(e)
  float cap_in, cap_out;  // score = cap_out * tanh(cap_in * score) first, if cap_out is not 0
  uint32_t beside;    // of decoding on Hopper: not 0 if it runs beside the prompts' kernel, queued just before
};

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// The first position that the query at `position` sees.
__device__ __forceinline__ uint32_t first_seen(const AttentionArgs& args, uint32_t position) {
  return position < args.window ? 0 : position + 1 - args.window;
}

// The index of a block's work among `count` when each of `blocks` takes every blocks-th, back and forth:
// work comes largest first, so this evens out what the blocks get. False when there is no more.
__device__ __forceinline__ bool next_work(uint32_t round, uint32_t count, uint32_t blocks, uint32_t& index) {
  const uint32_t place = round % 2 == 0 ? blockIdx.x : blocks - 1 - blockIdx.x;
  index = round * blocks + place;
  return blockIdx.x < blocks && index < count;
}

// Hides the scores of positions that a row doesn't see. Element 4 j + 2 h + i is the row at position own[h]
// and position start + 8 j + column + i.
template <int COUNT>
__device__ __forceinline__ void hide_unseen(float (&scores)[COUNT], const AttentionArgs& args, uint32_t start,
                                            const uint32_t (&own)[2], uint32_t column) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    // How far back it lies; of later positions, huge.
    const uint32_t back = own[i / 2 % 2] - start - column - (i / 4 * 8 + i % 2);
    if (back >= args.window) scores[i] = -infinity();
  }
}

template <int COUNT>
__device__ __forceinline__ void cap_scores(float (&scores)[COUNT], const AttentionArgs& args) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    // tanh(x) = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite.
    constexpr float TWO_LOG2_E = 2.885390082f;
    const float power = exp2_fast(args.cap_in * scores[i] * TWO_LOG2_E);
    scores[i] = args.cap_out * (1.f - __fdividef(2.f, power + 1.f));
  }
}

// The weights of two query rows. Scores, and later weights, lie as the matrix instructions leave them: of a
// thread's elements 4 j .. 4 j + 3, two belong to its first row and two to its second, eight rows on;
// four neighbouring lanes share a row.
struct Weights {
  float max[2] = {-infinity(), -infinity()};  // of scores, before `scale`
  float sum[2] = {0.f, 0.f};                  // over this thread's elements

  // Turns scores into weights, 2^(scale * (score - maximum)), and gives the factor by which a changed
  // maximum scales what was summed before. Of the two rows those from `rows` on are left as they are.
  template <int COUNT>
  __device__ __forceinline__ void add(float (&scores)[COUNT], float scale, float (&change)[2], int rows = 2) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      if (row >= rows) break;
      float top = max[row];
#pragma unroll
      for (int i = 2 * row; i < COUNT; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      // A row that sees nothing of all this has only scores of -inf: any other reference will do.
      const float reference = top == -infinity() ? 0.f : __fmul_rn(top, scale);
      // Not fused: where the maximum stays, the factor must be 1 to the last bit.
      change[row] = exp2_fast(__fadd_rn(__fmul_rn(max[row], scale), -reference));
      max[row] = top;
      float total = __fmul_rn(sum[row], change[row]);
#pragma unroll
      for (int i = 2 * row; i < COUNT; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; j++) {
          scores[j] = exp2_fast(__fmaf_rn(scores[j], scale, -reference));
          total = __fadd_rn(total, scores[j]);
        }
      }
      sum[row] = total;
    }
  }

  // What a partial result says of itself: the maximum, scaled, and the sum over the whole row.
  __device__ __forceinline__ float2 row(int row, float scale) const {
    float total = sum[row];
    total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 1));
    total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 2));
    return make_float2(__fmul_rn(max[row], scale), total);
  }
};

// Adds a partial result to what came before it, both (scaled maximum, sum): `total` is changed, and
// the outputs are to be combined as out * before + part * after.
__device__ __forceinline__ void merge(float2& total, float2 part, float& before, float& after) {
  const float top = fmaxf(total.x, part.x), reference = top == -infinity() ? 0.f : top;
  before = exp2_fast(__fadd_rn(total.x, -reference));
  after = exp2_fast(__fadd_rn(part.x, -reference));
  total = make_float2(top, __fmaf_rn(part.y, after, __fmul_rn(total.y, before)));
}

__device__ __forceinline__ float merged(float out, float part, float before, float after) {
  return __fmaf_rn(part, after, __fmul_rn(out, before));
}

// Merges `parts` partial results, `stride` slots apart from `slot` on, in order, and writes the output
// of `rows` rows of the group. Called by `threads` threads that have all seen the parts' counter.
template <int HD>
__device__ __forceinline__ void merge_parts(const AttentionArgs& args, size_t slot, uint32_t stride,
                                            uint32_t parts, uint32_t first_row, uint32_t rows, bf16* out,
                                            uint32_t thread, uint32_t threads) {
  constexpr uint32_t QUADS = HD / 4;
  for (uint32_t i = thread; i < rows * QUADS; i += threads) {
    const uint32_t row = first_row + i / QUADS, column = i % QUADS * 4;
    float2 total = make_float2(-infinity(), 0.f);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (uint32_t part = 0; part < parts; part++) {
      const size_t at = (slot + size_t(part) * stride) * args.group + row;
      // Past L1, which may hold what another block wrote over.
      const float2 weight = __ldcg(args.partial_sum + at);
      const float4 x = __ldcg(reinterpret_cast<const float4*>(args.partial_out + at * HD + column));
      float before, after;
      merge(total, weight, before, after);
      sum.x = merged(sum.x, x.x, before, after);
      sum.y = merged(sum.y, x.y, before, after);
      sum.z = merged(sum.z, x.z, before, after);
      sum.w = merged(sum.w, x.w, before, after);
    }
    const float inverse = 1.f / total.y;
    *reinterpret_cast<uint2*>(out + size_t(row) * HD + column) =
        make_uint2(pack_bf16(sum.x * inverse, sum.y * inverse), pack_bf16(sum.z * inverse, sum.w * inverse));
  }
}
