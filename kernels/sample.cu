// From logits to tokens: biases, bans, grammar mask, penalties, temperature, top-k, top-p, min-p, draw,
// logprobs. One block per wanted position; nothing is sorted: see select.cuh.
//
// Logprobs are of the raw logits: biases and bans are added in place and taken back afterwards,
// penalties and the mask are applied while reading.
//
// logits   f32 [n, stride], rows aligned to 16 bytes; stride >= vocab, a multiple of 4
// counts   u16 [slots, counts_stride(vocab)]: 0 for tokens never seen, else 1 + how often it was sampled
// masks    u32 [masks of the step, ceil(vocab / 32)], a bit per token that the grammar allows
// failed   u32 [rows of the batch]: rows that failed before are skipped; non-finite logits fail
// chosen, tops   [2][n], [2][n][MAX_TOP]: prompt tokens', then sampled tokens'
//
// Launch: n blocks of 1024 threads; vocab <= MAX_VOCAB, above which a bin could overflow. Roofline:
// a greedy row reads its logits once, others mostly twice: the second time for the sum of the weights.
#include "ptx.cuh"
#include "select.cuh"

// The best token of a row, see `ranked`.
template <bool MODIFIED>
__device__ __noinline__ uint64_t best(Row<MODIFIED> row, Shared& s) {
  float highest = -INFINITY;
  uint32_t token = NONE;
  row.scan([&](uint32_t t, float logit) {
    if (logit > highest) highest = logit, token = t;
  });
  if (token == NONE) token = 0;  // nothing is allowed
  return reduce_block(ranked(token, highest), Max{}, s.sums);
}

// What a thread sees in a first pass over a row.
struct Seen {
  float highest = -INFINITY;  // logit as modified, and its token
  uint32_t token = NONE;
  float highest_raw = -INFINITY;
  float nothing = 0.f;  // not a number if a logit is not finite
  float sum = 0.f, squares = 0.f;  // of every fourth logit

  __device__ __forceinline__ void look(uint32_t t, float raw, float logit) {
    nothing = fmaf(raw, 0.f, nothing);
    highest_raw = fmaxf(highest_raw, raw);
    if (logit > highest) highest = logit, token = t;
  }

  template <bool MODIFIED>
  __device__ __forceinline__ void look(const Row<MODIFIED>& row) {
    row.scan_both(0, row.vectors(), [&](uint32_t t, float4 raw, float4 v) {
      sum += raw.x, squares = fmaf(raw.x, raw.x, squares);
      look(t, raw.x, v.x);
      look(t + 1, raw.y, v.y);
      look(t + 2, raw.z, v.z);
      look(t + 3, raw.w, v.w);
    });
  }

  // A logit that few tokens reach: of a normal distribution 0.3 %.
  __device__ float few_above(uint32_t vectors, Shared& s) const {
    float* const scratch = reinterpret_cast<float*>(s.sums);
    const float mean = reduce_block(sum, Sum{}, scratch) / vectors;
    const float square = reduce_block(squares, Sum{}, scratch) / vectors;
    return mean + 2.75f * sqrtf(fmaxf(square - mean * mean, 0.f));
  }
};

// The bin up to which tokens are listed: all of them where there are few, else those above `few_above`.
__device__ __forceinline__ uint32_t near_bin(uint32_t vocab, Softmax softmax, float few_above) {
  if (vocab <= CANDIDATES) return BINS - 1;
  return Softmax::bin(fminf(softmax.distance(fminf(few_above, softmax.max)), BINS - 2));
}

// Draws from what top-k, top-p and min-p leave. The highest logit is finite.
template <bool MODIFIED>
__device__ __noinline__ uint32_t draw(Row<MODIFIED> row, const SlotParams& p, float highest, float few_above,
                                      uint32_t position, Shared& s) {
  const Softmax softmax{highest, p.inv_temperature * LOG2_E};
  const Uniform uniform{p.seed, position};
  const bool has_top_k = p.top_k > 0 && p.top_k < row.vocab, has_top_p = p.top_p < 1.f;
  const Mass mass{softmax};
  Cut cut;
  uint64_t total = 0;
  if (has_top_k || has_top_p) {
    const uint32_t near = near_bin(row.vocab, softmax, few_above);
    total = fill_bins(row, softmax, near, s);
    // Of what top-k keeps, top-p keeps the first.
    const uint32_t last = has_top_k ? reach(Count{}, p.top_k, s) : reach(mass, top_p_target(p, total), s);
    const uint32_t listed = list_upto(row, softmax, near, last, s);
    const uint32_t top_k = has_top_k ? p.top_k : NONE;
    if (listed <= CANDIDATES) return draw_listed(listed, top_k, total, p, softmax, uniform, s);
  }
  if (has_top_k) {
    cut = find_cut(row, softmax, Count{}, p.top_k, s);
    cut.ties = uint32_t(p.top_k - cut.above);
    if (has_top_p) {
      uint64_t above = 0;
      row.scan([&](uint32_t, float logit) {
        if (logit > cut.logit) above += mass(logit);
      });
      total = sum(above, s) + cut.ties * mass(cut.logit);
    }
  }
  if (has_top_p) {
    const uint64_t target = top_p_target(p, total);
    cut = find_cut(row, softmax, mass, target, s);
    const uint64_t one = max(mass(cut.logit), uint64_t(1));
    cut.ties = uint32_t((target - cut.above + one - 1) / one);
  }
  const AtLeast weight{softmax, p.min_p};
  const uint64_t tie_weight = cut.ties > 0 ? in_units(weight(cut.logit)) : 0;
  return find_token(row, cut, tie_weight, weight, uniform, s);
}

// Lists the `k` most likely tokens in their order, of any row. The bins are filled.
__device__ __noinline__ void list_highest(Row<false> row, Softmax softmax, uint32_t k, Shared& s) {
  Cut cut = find_cut(row, softmax, Count{}, k, s);
  cut.ties = uint32_t(k - cut.above);
  uint32_t last_tie = NONE;
  if (cut.at > cut.ties) last_tie = find_token(row, cut, 1, Nothing{}, Exactly{cut.ties - 1}, s);
  __syncthreads();
  if (threadIdx.x == 0) s.candidate_count = 0;
  __syncthreads();
  row.scan([&](uint32_t token, float logit) {
    if (logit > cut.logit || (logit == cut.logit && token <= last_tie)) list_token(token, logit, s);
  });
  sort_listed(k, s);
}

// Log-probability and rank of `token`, and the `k` most likely tokens, of the raw logits.
__device__ __noinline__ void write_logprobs(Row<false> raw, float highest, float few_above, uint32_t token,
                                            uint32_t k, Chosen* chosen, Top* tops, Shared& s) {
  const Softmax softmax{highest, LOG2_E};
  const float own = raw.logits[token];
  const uint32_t near = near_bin(raw.vocab, softmax, few_above);
  const uint64_t total = fill_bins(raw, softmax, near, s);
  const double log_sum = double(highest) + log(double(total) / UNIT);

  k = min(min(k, uint32_t(MAX_TOP)), raw.vocab);
  const uint32_t last = reach(Count{}, max(k, 1u), s);
  const uint32_t listed = list_upto(raw, softmax, near, last, s);
  uint64_t ahead = 0;
  if (listed <= CANDIDATES && Softmax::bin(softmax.distance(own)) <= last) {
    for (uint32_t i = threadIdx.x; i < listed; i += THREADS) ahead += s.listed[i] > ranked(token, own);
  } else {
    raw.scan([&](uint32_t other, float logit) { ahead += logit > own || (logit == own && other < token); });
  }
  ahead = sum(ahead, s);
  if (listed <= CANDIDATES) {
    if (k > 0) sort_listed(listed, s);
  } else if (k > 0) {  // very many are equal
    list_highest(raw, softmax, k, s);
  }
  if (threadIdx.x < k) {
    const uint64_t mine = s.listed[threadIdx.x];
    tops[threadIdx.x] = Top{~uint32_t(mine), float(ranked_logit(mine) - log_sum)};
  }
  if (threadIdx.x == 0) *chosen = Chosen{int32_t(token), float(own - log_sum), uint32_t(ahead) + 1, k};
  __syncthreads();
}

// Adds a slot's biases and bans in place; `undo` takes them back.
struct Edits {
  static constexpr int BANS_PER_THREAD = MAX_BANS / THREADS;
  static_assert(MAX_BIASES <= THREADS, "a thread has one bias");

  float* logits;
  const Edit* edits;  // biases, then bans
  uint32_t biases, bans;
  float before_bias, before_ban[BANS_PER_THREAD];

  // Calls f(logit, what it was before) for this thread's bans.
  template <typename F>
  __device__ __forceinline__ void for_each_ban(F f) {
#pragma unroll
    for (int i = 0; i < BANS_PER_THREAD; i++) {
      const uint32_t ban = i * THREADS + threadIdx.x;
      if (ban < bans) f(logits[edits[biases + ban].token], before_ban[i]);
    }
  }

  __device__ void apply() {
    if (threadIdx.x < biases) {
      const Edit e = edits[threadIdx.x];
      before_bias = logits[e.token];
      logits[e.token] = before_bias + e.bias;
    }
    __syncthreads();  // a token may be biased and banned
    for_each_ban([](float& logit, float& before) { before = logit; });
    __syncthreads();  // and banned twice
    for_each_ban([](float& logit, float&) { logit = -INFINITY; });
    __syncthreads();
  }

  __device__ void undo() {
    __syncthreads();
    for_each_ban([](float& logit, float& before) { logit = before; });
    __syncthreads();
    if (threadIdx.x < biases) logits[edits[threadIdx.x].token] = before_bias;
    __syncthreads();
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(float* logits, uint32_t stride, uint32_t vocab, const Want* __restrict__ wants,
           const SlotParams* __restrict__ slots, const Edit* __restrict__ edits, uint32_t edit_stride,
           uint16_t* counts, const uint32_t* __restrict__ masks, uint32_t* generated, int32_t* last, uint32_t* failed,
           Chosen* chosen, Top* tops) {
  __shared__ Shared s;
  let_next_start();
  wait_for_previous();
  const uint32_t index = blockIdx.x, n = gridDim.x;
  const Want want = wants[index];
  if (threadIdx.x < 2) chosen[threadIdx.x * n + index] = Chosen{-1, 0.f, 0, 0};
  if (want.slot == NONE) return;
  __syncthreads();
  const SlotParams& p = slots[want.slot];
  float* const mine = logits + size_t(index) * stride;
  const Row<false> raw{mine, vocab, nullptr, nullptr, &p};
  const bool counted = want.sample && p.has_penalties, masked = want.sample && want.mask != NONE;
  uint16_t* const own_counts = counted ? counts + size_t(want.slot) * counts_stride(vocab) : nullptr;
  const uint32_t* mask = masked ? masks + size_t(want.mask) * ((vocab + 31) / 32) : nullptr;
  const Row<true> row{mine, vocab, own_counts, mask, &p};
  const bool modified = counted || masked;

  Seen seen;
  if (modified) {
    seen.look(row);
  } else {
    seen.look(raw);
  }
  const bool broken = seen.nothing != 0.f || failed[want.row] != 0;
  if (__syncthreads_or(broken)) {
    if (threadIdx.x == 0) {
      failed[want.row] = 1;
      if (want.sample) last[want.slot] = -1;
    }
    return;
  }
  const bool drawn = want.sample && p.inv_temperature > 0.f, logprobs = want.sample && p.top_logprobs != NONE;
  if (seen.token == NONE) seen.token = 0;  // nothing is allowed
  uint64_t top = reduce_block(ranked(seen.token, seen.highest), Max{}, s.sums);
  float highest_raw = ranked_logit(top), few_above = 0.f;
  if (modified) highest_raw = ranked_logit(reduce_block(ranked(0, seen.highest_raw), Max{}, s.sums));
  const bool cut = drawn && (p.top_k > 0 || p.top_p < 1.f);
  if (cut || logprobs || want.target != NONE) few_above = seen.few_above(raw.vectors(), s);
  if (want.target != NONE) {
    write_logprobs(raw, highest_raw, few_above, want.target, p.prompt_top_logprobs, chosen + index,
                   tops + size_t(index) * MAX_TOP, s);
  }
  if (!want.sample) return;

  const uint32_t bans = generated[want.slot] < p.min_tokens ? p.bans : 0;
  Edits change{mine, edits + size_t(want.slot) * edit_stride, p.biases, bans, 0.f, {}};
  const bool edited = p.biases + bans > 0;
  if (edited) change.apply();
  if (edited) top = modified ? best(row, s) : best(raw, s);
  const float highest = ranked_logit(top);
  uint32_t token = ~uint32_t(top);
  if (drawn && isfinite(highest)) {
    token = modified ? draw(row, p, highest, few_above, want.position, s)
                     : draw(raw, p, highest, few_above, want.position, s);
  }
  if (edited) change.undo();
  if (logprobs) {
    write_logprobs(raw, highest_raw, few_above, token, p.top_logprobs, chosen + n + index, tops + size_t(n + index) * MAX_TOP, s);
  }
  if (threadIdx.x != 0) return;
  if (p.top_logprobs == NONE) chosen[n + index] = Chosen{int32_t(token), 0.f, 0, 0};
  last[want.slot] = int32_t(token);
  generated[want.slot] += 1;
  if (own_counts) own_counts[token] = uint16_t(min(max(uint32_t(own_counts[token]), 1u) + 1, 0xffffu));
}

// Starts slots: nothing sampled yet; the prompt's tokens are counted as seen if there are penalties.
//   bound  uint3 [n]: slot, first token in `prompts`, number of them
// Launch: n blocks of 1024 threads.
extern "C" __global__ void __launch_bounds__(THREADS)
    bind_slots(const uint3* __restrict__ bound, const uint32_t* __restrict__ prompts,
               const SlotParams* __restrict__ slots, uint32_t vocab, uint16_t* counts, uint32_t* generated,
               int32_t* last) {
  let_next_start();
  wait_for_previous();
  const uint3 b = bound[blockIdx.x];
  if (threadIdx.x == 0) generated[b.x] = 0, last[b.x] = -1;
  if (!slots[b.x].has_penalties) return;
  uint16_t* const mine = counts + size_t(b.x) * counts_stride(vocab);
  for (uint32_t i = threadIdx.x; i < vocab; i += THREADS) mine[i] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < b.z; i += THREADS) mine[prompts[b.y + i]] = 1;
}

// Marks rows that can't go on: the last position's hidden state is not finite, or the token that
// the row was to continue from does not exist.
//   x  bf16 [tokens, width], width a multiple of 8
//   rows  uint2 [n]: index of the row's last token, slot whose last token is its input or NONE
// Launch: one warp per row, 128 threads a block.
extern "C" __global__ void check_rows(const uint4* __restrict__ x, uint32_t width, const uint2* __restrict__ rows,
                                      uint32_t n, const int32_t* __restrict__ last, uint32_t* __restrict__ failed) {
  let_next_start();
  wait_for_previous();
  const uint32_t row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (row >= n) return;
  const uint2 r = rows[row];
  const uint4* from = x + size_t(r.x) * (width / 8);
  bool broken = r.y != NONE && last[r.y] < 0;
  for (uint32_t i = threadIdx.x % WARP; i < width / 8; i += WARP) {
    const uint4 v = from[i];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      // All ones in the exponent: infinity or not a number.
      broken |= (words[j] & 0x7f80u) == 0x7f80u || (words[j] & 0x7f800000u) == 0x7f800000u;
    }
  }
  broken = __any_sync(ALL_LANES, broken);
  if (threadIdx.x % WARP == 0) failed[row] = broken;
}
