// From logits to tokens: biases, bans, grammar mask, penalties, temperature, top-k, top-p, min-p, draw,
// logprobs. One block per wanted position; nothing is sorted.
//
// A token's weight e^((logit - max) / T) is a 64-bit integer, in units of 2^-40. Sums of integers
// do not depend on their order, so each choice below is exact and repeats bit for bit.
//
// - `Cut`: top-k and top-p keep the tokens above some logit, and the first few (by id) of those that
//   have just this logit. A histogram of the distances from the maximum brackets the cut in one pass
//   over the row; a second pass collects the tokens inside the bracket, mostly some dozens, and a
//   binary search over their logits finds it. A bracket that does not fit into shared memory (flat
//   distributions) is halved first, a pass for each halving.
// - The draw is the inverse of the cumulative distribution in order of ids: 32 segments, then 32
//   parts of the one that was hit, and so on. Random numbers come from (seed, position) alone.
// - Logprobs are of the raw logits: biases and bans are added in place and taken back afterwards,
//   penalties and the mask are applied while reading.
//
// logits   f32 [n, stride], rows aligned to 16 bytes; stride >= vocab
// counts   u16 [slots, vocab]: 0 for tokens never seen, else 1 + how often it was sampled
// masks    u32 [n, ceil(vocab / 32)], a bit per token that the grammar allows; may be null
// failed   u32 [rows of the batch]: rows that failed before are skipped; non-finite logits fail
// chosen, tops   [2][n], [2][n][MAX_TOP]: prompt tokens', then sampled tokens'
//
// Launch: n blocks of 1024 threads. Roofline: a greedy row reads its logits once, a drawn one three
// times (the second and third time from L2 where it holds n * vocab * 4 bytes).
#include "philox.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "sampling.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / WARP;
constexpr int CANDIDATES = 4096;
constexpr int BINS = 512;
constexpr float BINS_PER_NAT = 8.f;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float UNIT = 1099511627776.f;  // 2^40

struct Shared {
  uint64_t sums[WARP];
  uint64_t masses[WARPS];
  uint32_t ties[WARPS];
  uint32_t bins[BINS];
  uint32_t candidates[CANDIDATES];
  uint32_t candidate_count;
  uint64_t tops[MAX_TOP];
  // Where the draw goes on.
  uint32_t begin, end, ties_left;
  uint64_t rest;
};

// Unsigned numbers in the order of the floats; +0 and -0 are equal, as they are among floats.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A row's logits, as they are or with penalties and mask.
struct Row {
  const float* logits;
  uint32_t vocab;
  const uint16_t* counts;  // null: no penalties
  const uint32_t* mask;    // null: all allowed
  const SlotParams* params;

  __device__ __forceinline__ uint32_t vectors() const { return (vocab + 3) / 4; }

  __device__ __forceinline__ float modified(uint32_t token, float logit) const {
    if (mask && !(mask[token / 32] >> token % 32 & 1)) return -INFINITY;
    if (counts) {
      const uint32_t count = counts[token];
      if (count > 0) {
        const float r = params->repetition_penalty;
        logit = logit > 0.f ? logit / r : logit * r;
        if (count > 1) logit -= params->presence_penalty;
        logit -= __fmul_rn(params->frequency_penalty, count - 1);  // not fused: as on the CPU
      }
    }
    return logit;
  }

  // Calls f(token, logit) for this warp's share of vectors of four tokens: a contiguous part of
  // begin .. end. All threads of the block take part.
  template <typename F>
  __device__ __forceinline__ void scan(uint32_t begin, uint32_t end, F f) const {
    const uint32_t share = (end - begin + WARPS - 1) / WARPS;
    const uint32_t from = begin + threadIdx.x / WARP * share, to = min(from + share, end);
#pragma unroll 2
    for (uint32_t i = from + threadIdx.x % WARP; i < to; i += WARP) {
      const float4 v = reinterpret_cast<const float4*>(logits)[i];
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (4 * i + j < vocab) f(4 * i + j, modified(4 * i + j, four[j]));
      }
    }
  }

  template <typename F>
  __device__ __forceinline__ void scan(F f) const {
    scan(0, vectors(), f);
  }
};

// The distribution at a temperature.
struct Softmax {
  float max;
  float scale;  // 1 / (T ln 2)

  __device__ __forceinline__ uint64_t weight(float logit) const {
    return uint64_t(exp2f((logit - max) * scale) * UNIT);
  }

  // Ascends as the logit descends.
  __device__ __forceinline__ uint32_t bin(float logit) const {
    return uint32_t(fminf((max - logit) * scale * (LN_2 * BINS_PER_NAT), BINS - 1));
  }
};

// The best token: its key, then the complement of its id, so that the lowest id wins.
__device__ __forceinline__ uint64_t ranked(uint32_t token, float logit) {
  return uint64_t(key_of(logit)) << 32 | uint32_t(~token);
}

__device__ __forceinline__ uint64_t sum(uint64_t value, Shared& s) { return reduce_block(value, Sum{}, s.sums); }

__device__ __noinline__ uint64_t best(Row row, Shared& s) {
  uint64_t top = 0;
  row.scan([&](uint32_t token, float logit) { top = max(top, ranked(token, logit)); });
  return reduce_block(top, Max{}, s.sums);
}

// Tokens counted one by one, for top-k.
struct Count {
  __device__ __forceinline__ uint64_t operator()(float) const { return 1; }
  __device__ __forceinline__ static uint64_t low(uint32_t) { return 1; }
  __device__ __forceinline__ static uint64_t high(uint32_t) { return 1; }
};

// Tokens counted by their weight, for top-p. `low` and `high` bound the weights in a bin; their slack
// is more than what the rounding of a weight or a bin can move.
struct Mass {
  static constexpr float SLACK = 1e-4f;
  Softmax softmax;
  __device__ __forceinline__ uint64_t operator()(float logit) const { return softmax.weight(logit); }
  __device__ __forceinline__ static uint64_t low(uint32_t bin) {
    return bin == BINS - 1 ? 0 : uint64_t(exp2f(-float(bin + 1) / (BINS_PER_NAT * LN_2)) * (UNIT * (1 - SLACK)));
  }
  __device__ __forceinline__ static uint64_t high(uint32_t bin) {
    return uint64_t(exp2f(-float(bin) / (BINS_PER_NAT * LN_2)) * (UNIT * (1 + SLACK))) + 1;
  }
};

// A boundary in the order of the logits.
struct Cut {
  uint32_t key = 0;
  uint64_t above = 0;  // measure of the tokens above the key
  uint64_t at = 0;     // measure of those at it
  uint32_t ties = 0;   // of the tokens at the key, so many are kept, those with the lowest ids
};

// Fills the histogram; gives the sum of the weights.
__device__ __noinline__ uint64_t fill_bins(Row row, Softmax softmax, Shared& s) {
  for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
  __syncthreads();
  uint64_t total = 0;
  row.scan([&](uint32_t, float logit) {
    total += softmax.weight(logit);
    atomicAdd(&s.bins[softmax.bin(logit)], 1);
  });
  return sum(total, s);  // a barrier: the bins are complete
}

// How many bins, from the highest logits on, measure less than `target` together. `value`: this
// thread's bin; threads beyond the bins have 0.
__device__ __forceinline__ uint32_t bins_below(uint64_t target, uint64_t value, Shared& s) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  uint64_t upto = prefix_sum_lanes(value);
  __syncthreads();
  if (lane == WARP - 1) s.sums[warp] = upto;
  __syncthreads();
  upto += reduce_lanes(lane < warp ? s.sums[lane] : 0, Sum{});
  return __syncthreads_count(threadIdx.x < BINS && upto < target);
}

// The highest key at which the measure of all tokens from there up reaches the target, which the
// measure of the whole row does. The histogram is filled.
template <typename Measure>
__device__ __noinline__ Cut find_cut(Row row, Softmax softmax, Measure measure, uint64_t target, Shared& s) {
  const uint64_t in_bin = threadIdx.x < BINS ? s.bins[threadIdx.x] : 0;
  const uint32_t first = min(bins_below(target, in_bin * Measure::high(threadIdx.x), s), BINS - 1);
  const uint32_t last = min(bins_below(target, in_bin * Measure::low(threadIdx.x), s), BINS - 1);

  uint64_t above = 0;
  uint32_t low = 0xffffffffu, high = 0, count = 0;
  row.scan([&](uint32_t, float logit) {
    const uint32_t bin = softmax.bin(logit), key = key_of(logit);
    if (bin < first) above += measure(logit);
    if (bin < first || bin > last) return;
    low = min(low, key), high = max(high, key), count++;
  });
  above = sum(above, s);
  count = uint32_t(sum(count, s));
  low = ~uint32_t(reduce_block(uint64_t(~low), Max{}, s.sums));
  high = uint32_t(reduce_block(uint64_t(high), Max{}, s.sums));

  // Invariant: the cut is in low ..= high, as `count` tokens are; those above it measure `above`.
  while (count > CANDIDATES && low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    uint64_t upper = 0, upper_count = 0;
    row.scan([&](uint32_t, float logit) {
      const uint32_t key = key_of(logit);
      if (key >= middle && key <= high) upper += measure(logit), upper_count++;
    });
    upper = sum(upper, s), upper_count = sum(upper_count, s);
    if (above + upper >= target) {
      low = middle, count = uint32_t(upper_count);
    } else {
      high = middle - 1, count -= uint32_t(upper_count), above += upper;
    }
  }
  if (low == high) return Cut{low, above, measure(logit_of(low)) * count};

  if (threadIdx.x == 0) s.candidate_count = 0;
  __syncthreads();
  row.scan([&](uint32_t, float logit) {
    const uint32_t key = key_of(logit);
    if (key >= low && key <= high) s.candidates[atomicAdd(&s.candidate_count, 1)] = key;
  });
  __syncthreads();
  const auto measure_between = [&](uint32_t from, uint32_t to) {
    uint64_t total = 0;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
      const uint32_t key = s.candidates[i];
      if (key >= from && key <= to) total += measure(logit_of(key));
    }
    return sum(total, s);
  };
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const uint64_t upper = measure_between(middle, high);
    if (above + upper >= target) {
      low = middle;
    } else {
      high = middle - 1, above += upper;
    }
  }
  return Cut{low, above, measure_between(low, low)};
}

// The token at which the cumulative weight, in order of ids, passes `pick(its total)`. Tokens above
// the cut weigh `weight`; the first `cut.ties` at the cut, `tie_weight`; others nothing.
template <typename Weight, typename Pick>
__device__ __noinline__ uint32_t find_token(Row row, Cut cut, uint64_t tie_weight, Weight weight, Pick pick,
                                            Shared& s) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  uint32_t begin = 0, end = row.vectors();
  uint64_t rest = 0;
  for (bool first = true; first || end - begin > 1; first = false) {
    uint64_t mass = 0;
    uint32_t ties = 0;
    row.scan(begin, end, [&](uint32_t, float logit) {
      const uint32_t key = key_of(logit);
      if (key > cut.key) mass += weight(logit);
      ties += key == cut.key;
    });
    mass = reduce_lanes(mass, Sum{});
    ties = reduce_lanes(ties, Sum{});
    if (lane == 0) s.masses[warp] = mass, s.ties[warp] = ties;
    __syncthreads();
    if (warp == 0) {  // a lane per segment
      const uint32_t before = min(prefix_sum_lanes(s.ties[lane]) - s.ties[lane], cut.ties);
      const uint64_t here = s.masses[lane] + min(cut.ties - before, s.ties[lane]) * tie_weight;
      const uint64_t upto = prefix_sum_lanes(here);
      if (first) rest = pick(__shfl_sync(ALL_LANES, upto, WARP - 1));
      const int hit = min(__popc(__ballot_sync(ALL_LANES, upto <= rest)), WARP - 1);
      if (lane == hit) {
        const uint32_t share = (end - begin + WARPS - 1) / WARPS;
        s.begin = begin + hit * share, s.end = min(end, s.begin + share);
        s.rest = rest - (upto - here), s.ties_left = cut.ties - before;
      }
    }
    __syncthreads();
    begin = s.begin, end = s.end, rest = s.rest, cut.ties = s.ties_left;
  }
  // Four tokens are left; every thread looks at them.
  uint32_t found = 4 * begin;
  for (uint32_t token = 4 * begin; token < min(4 * begin + 4, row.vocab); token++) {
    const float logit = row.modified(token, row.logits[token]);
    const uint32_t key = key_of(logit);
    uint64_t here = key > cut.key ? weight(logit) : 0;
    if (key == cut.key && cut.ties > 0) here = tie_weight, cut.ties--;
    if (here == 0) continue;
    found = token;
    if (rest < here) break;
    rest -= here;
  }
  return found;
}

// Weights, without the tokens that min-p drops.
struct AtLeast {
  Softmax softmax;
  uint64_t least;
  __device__ __forceinline__ uint64_t operator()(float logit) const {
    const uint64_t w = softmax.weight(logit);
    return w >= least ? w : 0;
  }
};

struct Uniform {
  uint64_t seed;
  uint32_t position;
  __device__ __forceinline__ uint64_t operator()(uint64_t total) const { return draw_below(total, seed, position); }
};

// Draws from what top-k, top-p and min-p leave. The highest logit is finite.
__device__ uint32_t draw(const Row& row, const SlotParams& p, float highest, uint32_t position, Shared& s) {
  const Softmax softmax{highest, p.inv_temperature * LOG2_E};
  const bool has_top_k = p.top_k > 0 && p.top_k < row.vocab, has_top_p = p.top_p < 1.f;
  Cut cut;
  uint64_t total = has_top_k || has_top_p ? fill_bins(row, softmax, s) : 0;
  if (has_top_k) {
    cut = find_cut(row, softmax, Count{}, p.top_k, s);
    cut.ties = uint32_t(p.top_k - cut.above);
    if (has_top_p) {
      uint64_t above = 0;
      row.scan([&](uint32_t, float logit) {
        if (key_of(logit) > cut.key) above += softmax.weight(logit);
      });
      total = sum(above, s) + cut.ties * softmax.weight(logit_of(cut.key));
    }
  }
  if (has_top_p) {
    const uint64_t target = max(uint64_t(double(p.top_p) * double(total)), uint64_t(1));
    cut = find_cut(row, softmax, Mass{softmax}, target, s);
    const uint64_t one = softmax.weight(logit_of(cut.key));
    cut.ties = uint32_t((target - cut.above + one - 1) / one);
  }
  const AtLeast weight{softmax, max(uint64_t(p.min_p * UNIT), uint64_t(1))};
  const uint64_t tie_weight = cut.ties > 0 ? weight(logit_of(cut.key)) : 0;
  return find_token(row, cut, tie_weight, weight, Uniform{p.seed, position}, s);
}

struct Nothing {
  __device__ __forceinline__ uint64_t operator()(float) const { return 0; }
};

struct Exactly {
  uint64_t rest;
  __device__ __forceinline__ uint64_t operator()(uint64_t) const { return rest; }
};

// Log-probability and rank of `token`, and the `k` most likely tokens, of the raw logits.
__device__ __noinline__ void write_logprobs(Row raw, float highest, uint32_t token, uint32_t k, Chosen* chosen,
                                            Top* tops, Shared& s) {
  const Softmax softmax{highest, LOG2_E};
  const float own = raw.logits[token];
  uint64_t ahead = 0;
  raw.scan([&](uint32_t other, float logit) { ahead += logit > own || (logit == own && other < token); });
  ahead = sum(ahead, s);
  const uint64_t total = fill_bins(raw, softmax, s);
  const double log_sum = double(highest) + log(double(total) / UNIT);

  k = min(min(k, uint32_t(MAX_TOP)), raw.vocab);
  if (k > 0) {
    Cut cut = find_cut(raw, softmax, Count{}, k, s);
    cut.ties = uint32_t(k - cut.above);
    uint32_t last_tie = NONE;
    if (cut.at > cut.ties) last_tie = find_token(raw, cut, 1, Nothing{}, Exactly{cut.ties - 1}, s);
    if (threadIdx.x == 0) s.candidate_count = 0;
    __syncthreads();
    raw.scan([&](uint32_t other, float logit) {
      const uint32_t key = key_of(logit);
      if (key > cut.key || (key == cut.key && other <= last_tie)) {
        s.tops[atomicAdd(&s.candidate_count, 1)] = ranked(other, logit);
      }
    });
    __syncthreads();
    if (threadIdx.x < k) {
      const uint64_t mine = s.tops[threadIdx.x];
      uint32_t place = 0;
      for (uint32_t i = 0; i < k; i++) place += s.tops[i] > mine;
      tops[place] = Top{~uint32_t(mine), float(logit_of(uint32_t(mine >> 32)) - log_sum)};
    }
  }
  if (threadIdx.x == 0) *chosen = Chosen{int32_t(token), float(own - log_sum), uint32_t(ahead) + 1, k};
  __syncthreads();
}

// Adds a slot's biases and bans in place, one per thread; `undo` takes them back.
struct Edits {
  float* logits;
  const Edit* edits;
  uint32_t biases, bans;
  float before_bias, before_ban;

  __device__ void apply() {
    if (threadIdx.x < biases) {
      const Edit e = edits[threadIdx.x];
      before_bias = logits[e.token];
      logits[e.token] = before_bias + e.bias;
    }
    __syncthreads();  // a token may be biased and banned
    if (threadIdx.x < bans) {
      const Edit e = edits[biases + threadIdx.x];
      before_ban = logits[e.token];
    }
    __syncthreads();  // and banned twice
    if (threadIdx.x < bans) logits[edits[biases + threadIdx.x].token] = -INFINITY;
    __syncthreads();
  }

  __device__ void undo() {
    __syncthreads();
    if (threadIdx.x < bans) logits[edits[biases + threadIdx.x].token] = before_ban;
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
  const Row raw{mine, vocab, nullptr, nullptr, &p};

  uint64_t top = 0;
  uint64_t broken = failed[want.row];
  raw.scan([&](uint32_t token, float logit) {
    top = max(top, ranked(token, logit));
    broken |= !isfinite(logit);
  });
  if (sum(broken, s) != 0) {
    if (threadIdx.x == 0) {
      failed[want.row] = 1;
      if (want.sample) last[want.slot] = -1;
    }
    return;
  }
  top = reduce_block(top, Max{}, s.sums);
  const float highest_raw = logit_of(uint32_t(top >> 32));
  if (want.target != NONE) {
    write_logprobs(raw, highest_raw, want.target, p.prompt_top_logprobs, chosen + index,
                   tops + size_t(index) * MAX_TOP, s);
  }
  if (!want.sample) return;

  uint16_t* const own_counts = p.has_penalties ? counts + size_t(want.slot) * vocab : nullptr;
  const uint32_t* mask = masks ? masks + size_t(index) * ((vocab + 31) / 32) : nullptr;
  const uint32_t bans = generated[want.slot] < p.min_tokens ? p.bans : 0;
  Edits change{mine, edits + size_t(want.slot) * edit_stride, p.biases, bans, 0.f, 0.f};
  // Bans come after all biases, whether they count or not.
  const bool edited = p.biases + bans > 0;
  if (edited) change.apply();
  const Row row{mine, vocab, own_counts, mask, &p};
  if (edited || own_counts || mask) top = best(row, s);
  const float highest = logit_of(uint32_t(top >> 32));
  uint32_t token = ~uint32_t(top);
  if (p.inv_temperature > 0.f && isfinite(highest)) token = draw(row, p, highest, want.position, s);
  if (edited) change.undo();
  if (p.top_logprobs != NONE) {
    write_logprobs(raw, highest_raw, token, p.top_logprobs, chosen + n + index, tops + size_t(n + index) * MAX_TOP, s);
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
  uint16_t* const mine = counts + size_t(b.x) * vocab;
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
