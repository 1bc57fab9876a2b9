// Embedding: out[t] = scale * table[token(t)].
//
// tokens  u32 [n]             a token id, or LAST | slot: the token sampled last for that slot
// last    i32 [slots]         -1 where there is none (the row has failed: token 0 stands in)
// table   bf16 [vocab, width]
// out     bf16 [n, width]
//
// Launch: one block per token, one 16-byte vector per thread and turn; width is a multiple of 8.
// Roofline: 4 * width bytes per token; launch-bound in decode.
#include "ptx.cuh"
#include "token.cuh"
#include "types.cuh"

extern "C" __global__ void embed(const uint32_t* __restrict__ tokens, const int32_t* __restrict__ last,
                                 const bf16* __restrict__ table, float scale, int width,
                                 bf16* __restrict__ out) {
  let_next_start();
  wait_for_previous();
  const bf16* from = table + size_t(token_at(tokens, last)) * width;
  bf16* to = out + size_t(blockIdx.x) * width;
  for (int i = threadIdx.x * VEC; i < width; i += blockDim.x * VEC) {
    Vec8 v = load8(from + i);
#pragma unroll
    for (int j = 0; j < VEC; j++) v.x[j] *= scale;
    store8(to + i, v);
  }
}
