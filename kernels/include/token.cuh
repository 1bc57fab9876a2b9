// The tokens of a step, as the embedding kernels get them.
#pragma once

#include <cstdint>

// In place of a token id, with a slot in the other bits: the token sampled last for that slot.
constexpr uint32_t LAST = 0x80000000u;

// The block's token. -1 in `last` says that there is none (the row has failed): token 0 stands in.
__device__ __forceinline__ int token_at(const uint32_t* tokens, const int32_t* last) {
  const uint32_t token = tokens[blockIdx.x];
  return token & LAST ? max(last[token & ~LAST], 0) : static_cast<int>(token);
}
