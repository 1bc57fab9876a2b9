// Cuts a distribution and draws from it, without a sort.
//
// A token's weight is e^((logit - max) / T); sums of weights are 64-bit integers in units of 2^-40, so
// they do not depend on their order, and everything here repeats bit for bit.
//
// - A histogram of the distances from the maximum tells how far top-k or top-p can reach: a bin adds up its
//   tokens' weights relative to the bin's own, in 1/8192, which tells their mass to 10^-4 and their
//   number to 2 % with one 32-bit addition per token. The pass that fills it also lists the tokens near the
//   maximum. If the reach is within those, which it mostly is, or else a further pass finds few
//   enough, these alone are sorted, cut and drawn from, in shared memory.
// - Otherwise (flat distributions) a cut is searched, a logit: kept are the tokens above it, and the first
//   few (by id) of those that have just this logit. The histogram brackets it; a pass over the row
//   collects the tokens inside the bracket, among which the cut is found. A bracket that does not fit
//   into shared memory is halved before, a pass for each halving.
// - A draw inverts the cumulative distribution in order of ids; that of a whole row by 32 segments, then
//   32 parts of the one that was hit, and so on.
#pragma once
#include "philox.cuh"
#include "row.cuh"

constexpr int CANDIDATES = 4096;
constexpr int FEW = 256;
constexpr int BINS = THREADS;
constexpr float BINS_PER_NAT = 64.f;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float UNIT = 1099511627776.f;  // 2^40
constexpr float BIN_UNIT = 8192.f;

struct Shared {
  uint64_t sums[WARP];
  uint64_t masses[WARPS];
  uint32_t ties[WARPS];
  uint32_t bins[BINS];
  union {
    uint32_t candidates[CANDIDATES];
    uint64_t listed[CANDIDATES];  // see `ranked`
  };
  uint64_t measures[FEW];
  uint32_t candidate_count;
  uint32_t cut_key;
  uint64_t cut_above, cut_at;
  // Where the draw goes on.
  uint32_t begin, end, ties_left;
  uint64_t rest;
};

__device__ __forceinline__ uint64_t sum(uint64_t value, Shared& s) { return reduce_block(value, Sum{}, s.sums); }

// The distribution at a temperature.
struct Softmax {
  float max;
  float scale;  // 1 / (T ln 2)

  // Relative to the most likely token, in 0 ..= 1.
  __device__ __forceinline__ float weight(float logit) const {
    float w;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(w) : "f"((logit - max) * scale));
    return w;
  }

  // Distance from the maximum in bins, at most the last, which nobody counts. The same bits wherever it is computed.
  __device__ __forceinline__ float distance(float logit) const {
    return fminf(__fmul_rn(max - logit, scale * (LN_2 * BINS_PER_NAT)), BINS - 1);
  }

  // The nearest bin. (Adding 2^23 rounds to an integer, which the low bits then hold: a conversion
  // takes four times as long.)
  __device__ __forceinline__ static uint32_t bin(float distance) {
    return __float_as_uint(__fadd_rn(distance, 8388608.f)) & 0x7fffffu;
  }
};

__device__ __forceinline__ uint64_t in_units(float weight) { return uint64_t(weight * UNIT); }

// Tokens counted one by one, for top-k.
struct Count {
  __device__ __forceinline__ uint64_t operator()(float) const { return 1; }
  // Bounds on what a bin holds: a token's relative weight is e^-x of an x up to half a bin.
  static constexpr uint32_t LIGHTEST = 8127, HEAVIEST = 8258;
  static_assert(BINS_PER_NAT == 64 && BIN_UNIT == 8192);
  __device__ __forceinline__ static uint64_t least(uint32_t, uint32_t held) {
    return (held + HEAVIEST - 1) / HEAVIEST;
  }
  __device__ __forceinline__ static uint64_t most(uint32_t, uint32_t held) { return held / LIGHTEST; }
};

// Tokens counted by their weight, for top-p.
struct Mass {
  // More than the rounding of weights and bins can move.
  static constexpr double SLACK = 1e-4;
  Softmax softmax;
  __device__ __forceinline__ uint64_t operator()(float logit) const { return in_units(softmax.weight(logit)); }
  __device__ __forceinline__ static double middle(uint32_t bin, uint32_t held) {
    return double(held) * exp2f(-float(bin) / (BINS_PER_NAT * LN_2)) * (UNIT / BIN_UNIT);
  }
  __device__ __forceinline__ static uint64_t least(uint32_t bin, uint32_t held) {
    return uint64_t(middle(bin, held) * (1 - SLACK));
  }
  __device__ __forceinline__ static uint64_t most(uint32_t bin, uint32_t held) {
    return uint64_t(middle(bin, held) * (1 + SLACK)) + 1;
  }
};

// How much of a total weight top-p keeps at least.
__device__ __forceinline__ uint64_t top_p_target(const SlotParams& p, uint64_t total) {
  return max(uint64_t(double(p.top_p) * double(total)), uint64_t(1));
}

// A boundary in the order of the logits.
struct Cut {
  float logit = -INFINITY;
  uint64_t above = 0;  // measure of the tokens above it
  uint64_t at = 0;     // measure of those at it
  uint32_t ties = 0;   // of the tokens at it, so many are kept, those with the lowest ids
};

// Puts a token into the list. Where they are too many, only that counts.
__device__ __forceinline__ void list_token(uint32_t token, float logit, Shared& s) {
  if (*static_cast<volatile uint32_t*>(&s.candidate_count) > CANDIDATES) return;
  const uint32_t i = atomicAdd(&s.candidate_count, 1);
  if (i < CANDIDATES) s.listed[i] = ranked(token, logit);
}

// Fills the histogram up to its last bin, and lists the tokens in the bins up to `near`; gives the sum of the
// weights.
template <bool MODIFIED>
__device__ __noinline__ uint64_t fill_bins(Row<MODIFIED> row, Softmax softmax, uint32_t near, Shared& s) {
  __syncthreads();
  s.bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) s.candidate_count = 0;
  __syncthreads();
  uint64_t total = 0;
  const auto add = [&](uint32_t token, float logit) {
    const float distance = softmax.distance(logit);
    const uint32_t bin = Softmax::bin(distance);
    if (bin < BINS - 1) {
      // e^-x for the small x within a bin, to 5e-6.
      const float x = (distance - float(int32_t(bin))) / BINS_PER_NAT;
      const float relative = __fadd_rn(BIN_UNIT * (1.f - x + 0.5f * x * x), 8388608.f);
      atomicAdd(&s.bins[bin], __float_as_uint(relative) & 0x7fffffu);
    }
    if (bin <= near) list_token(token, logit, s);
    return softmax.weight(logit);
  };
  row.scan_vectors(0, row.vectors(), [&](uint32_t t, float4 v) {
    total += in_units((add(t, v.x) + add(t + 1, v.y)) + (add(t + 2, v.z) + add(t + 3, v.w)));
  });
  return sum(total, s);  // a barrier: bins and list are complete
}

// Sum of the values of the threads before this one.
__device__ __forceinline__ uint64_t sum_before(uint64_t value, Shared& s) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const uint64_t upto = prefix_sum_lanes(value);
  __syncthreads();
  if (lane == WARP - 1) s.sums[warp] = upto;
  __syncthreads();
  return upto - value + reduce_lanes(lane < warp ? s.sums[lane] : 0, Sum{});
}

// How many bins, from the highest logits on, measure less than `target` together. `value`: this
// thread's bin.
__device__ __forceinline__ uint32_t bins_below(uint64_t target, uint64_t value, Shared& s) {
  return __syncthreads_count(sum_before(value, s) + value < target);
}

// The bin that the tokens from the highest on reach when they measure `target`, or a later one.
template <typename Measure>
__device__ __forceinline__ uint32_t reach(Measure, uint64_t target, Shared& s) {
  return min(bins_below(target, Measure::least(threadIdx.x, s.bins[threadIdx.x]), s), BINS - 1);
}

// Makes the list that of all tokens in the bins up to `last` that may be chosen; says how many, or more than
// CANDIDATES if it has no room for them. Bins and list are those of `fill_bins`.
template <bool MODIFIED>
__device__ __noinline__ uint32_t list_upto(Row<MODIFIED> row, Softmax softmax, uint32_t near, uint32_t last,
                                           Shared& s) {
  const uint32_t listed = s.candidate_count;
  const auto within = [&](float logit) {
    return Softmax::bin(softmax.distance(logit)) <= last && logit > -INFINITY;
  };
  if (last <= near && listed <= CANDIDATES) {
    uint64_t own[CANDIDATES / THREADS];
#pragma unroll
    for (int j = 0; j < CANDIDATES / THREADS; j++) {
      const uint32_t i = j * THREADS + threadIdx.x;
      own[j] = i < listed ? s.listed[i] : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) s.candidate_count = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < CANDIDATES / THREADS; j++) {
      if (own[j] > 0 && within(ranked_logit(own[j]))) s.listed[atomicAdd(&s.candidate_count, 1)] = own[j];
    }
  } else {
    const uint64_t least = threadIdx.x <= last ? Count::least(threadIdx.x, s.bins[threadIdx.x]) : 0;
    if (sum(least, s) > CANDIDATES) return CANDIDATES + 1;
    if (threadIdx.x == 0) s.candidate_count = 0;
    __syncthreads();
    row.scan([&](uint32_t token, float logit) {
      if (within(logit)) list_token(token, logit, s);
    });
  }
  __syncthreads();
  return s.candidate_count;
}

// Sorts the first `n` of the list, the largest first (Batcher's bitonic network).
__device__ __noinline__ void sort_listed(uint32_t n, Shared& s) {
  uint32_t size = 2;
  while (size < n) size *= 2;
  __syncthreads();
  for (uint32_t i = n + threadIdx.x; i < size; i += THREADS) s.listed[i] = 0;
  __syncthreads();
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t apart = run / 2; apart > 0; apart /= 2) {
      for (uint32_t i = threadIdx.x; i < size / 2; i += THREADS) {
        const uint32_t low = 2 * i - (i & (apart - 1)), high = low + apart;
        const uint64_t a = s.listed[low], b = s.listed[high];
        if ((a < b) == ((low & run) == 0)) s.listed[low] = b, s.listed[high] = a;
      }
      __syncthreads();
    }
  }
}

// Draws from the `n` listed tokens, which hold all that top-k and top-p can keep. `top_k`: NONE if there is none;
// `total`: the weight of the whole row.
template <typename Pick>
__device__ __noinline__ uint32_t draw_listed(uint32_t n, uint32_t top_k, uint64_t total, const SlotParams& p,
                                             Softmax softmax, Pick pick, Shared& s) {
  constexpr int EACH = CANDIDATES / THREADS;
  const uint32_t first = threadIdx.x * EACH;
  sort_listed(n, s);
  uint32_t kept = min(top_k, n);
  // Each of top-k, top-p and min-p keeps the first ones, one at least.
  float weights[EACH];
  uint64_t mass = 0;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    weights[j] = first + j < kept ? softmax.weight(ranked_logit(s.listed[first + j])) : 0.f;
    mass += in_units(weights[j]);
  }
  if (top_k != NONE) total = sum(mass, s);
  const uint64_t target = p.top_p < 1.f ? top_p_target(p, total) : ~uint64_t(0);
  uint64_t before = sum_before(mass, s), stay = 0;
  uint64_t by_id[EACH];
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    const bool stays = first + j == 0 || (first + j < kept && before < target && weights[j] >= p.min_p);
    before += in_units(weights[j]);
    stay += stays;
    by_id[j] = stays ? s.listed[first + j] << 32 | s.listed[first + j] >> 32 : 0;
  }
  kept = uint32_t(sum(stay, s));
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    if (by_id[j] > 0) s.listed[first + j] = by_id[j];
  }
  sort_listed(kept, s);
  uint64_t masses[EACH];
  mass = 0;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    masses[j] = first + j < kept ? in_units(softmax.weight(logit_of(uint32_t(s.listed[first + j])))) : 0;
    mass += masses[j];
  }
  if (threadIdx.x == 0) s.cut_key = ~uint32_t(s.listed[0] >> 32);
  const uint64_t rest = pick(sum(mass, s));
  before = sum_before(mass, s);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    if (before <= rest && rest < before + masses[j]) s.cut_key = ~uint32_t(s.listed[first + j] >> 32);
    before += masses[j];
  }
  __syncthreads();
  return s.cut_key;
}

// The cut among collected candidates, when those above them measure `above`.
template <typename Measure>
__device__ __forceinline__ Cut cut_candidates(Measure measure, uint64_t target, uint64_t above, uint32_t count,
                                              Shared& s) {
  if (count <= FEW) {  // each thread places one of them
    const uint32_t own = threadIdx.x < count ? s.candidates[threadIdx.x] : 0;
    if (threadIdx.x < count) s.measures[threadIdx.x] = measure(logit_of(own));
    __syncthreads();
    if (threadIdx.x < count) {
      uint64_t at = 0;
      for (uint32_t i = 0; i < count; i++) {
        const uint32_t other = s.candidates[i];
        if (other > own) above += s.measures[i];
        if (other == own) at += s.measures[i];
      }
      // Those that are equal all find this of themselves, and write the same. If rounding lets none
      // reach the target, all tokens are kept.
      if (above < target && above + at >= target) s.cut_key = own, s.cut_above = above, s.cut_at = at;
    }
    __syncthreads();
    return Cut{logit_of(s.cut_key), s.cut_above, s.cut_at};
  }
  uint32_t low = 0xffffffffu, high = 0;
  for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
    low = min(low, s.candidates[i]), high = max(high, s.candidates[i]);
  }
  low = ~uint32_t(reduce_block(uint64_t(~low), Max{}, s.sums));
  high = uint32_t(reduce_block(uint64_t(high), Max{}, s.sums));
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
  return Cut{logit_of(low), above, measure_between(low, low)};
}

// The highest logit at which the measure of all tokens from there up reaches the target, which the
// measure of the whole row does. The histogram is filled.
template <bool MODIFIED, typename Measure>
__device__ __noinline__ Cut find_cut(Row<MODIFIED> row, Softmax softmax, Measure measure, uint64_t target, Shared& s) {
  const uint32_t held = s.bins[threadIdx.x];
  const uint32_t first = min(bins_below(target, Measure::most(threadIdx.x, held), s), BINS - 1);
  const uint32_t last = reach(measure, target, s);
  if (threadIdx.x == 0) s.candidate_count = 0;
  __syncthreads();
  uint64_t above = 0;
  row.scan([&](uint32_t, float logit) {
    const uint32_t bin = Softmax::bin(softmax.distance(logit));
    if (bin > last) return;
    if (bin < first) {
      above += measure(logit);
      return;
    }
    const uint32_t i = atomicAdd(&s.candidate_count, 1);
    if (i < CANDIDATES) s.candidates[i] = key_of(logit);
  });
  above = sum(above, s);
  uint32_t count = s.candidate_count;
  if (count <= CANDIDATES) {
    if (threadIdx.x == 0) s.cut_key = key_of(-INFINITY), s.cut_above = above, s.cut_at = 0;
    __syncthreads();
    return cut_candidates(measure, target, above, count, s);
  }

  uint32_t low = 0xffffffffu, high = 0;
  row.scan([&](uint32_t, float logit) {
    const uint32_t bin = Softmax::bin(softmax.distance(logit)), key = key_of(logit);
    if (bin >= first && bin <= last) low = min(low, key), high = max(high, key);
  });
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
  if (low == high) return Cut{logit_of(low), above, measure(logit_of(low)) * count};
  if (threadIdx.x == 0) s.candidate_count = 0, s.cut_key = low, s.cut_above = above, s.cut_at = 0;
  __syncthreads();
  row.scan([&](uint32_t, float logit) {
    const uint32_t key = key_of(logit);
    if (key >= low && key <= high) s.candidates[atomicAdd(&s.candidate_count, 1)] = key;
  });
  __syncthreads();
  return cut_candidates(measure, target, above, count, s);
}

// The token at which the cumulative weight, in order of ids, passes `pick(its total)`. Tokens above
// the cut weigh `weight`; the first `cut.ties` at the cut, `tie_weight`; others nothing.
template <bool MODIFIED, typename Weight, typename Pick>
__device__ __noinline__ uint32_t find_token(Row<MODIFIED> row, Cut cut, uint64_t tie_weight, Weight weight, Pick pick,
                                            Shared& s) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  uint32_t begin = 0, end = row.vectors();
  uint64_t rest = 0;
  const auto above = [&](float logit) { return logit > cut.logit ? weight(logit) : 0.f; };
  for (bool first = true; first || end - begin > 1; first = false) {
    uint64_t mass = 0;
    uint32_t ties = 0;
    row.scan_vectors(begin, end, [&](uint32_t, float4 v) {
      // Converted once per vector, in which every level adds in the same order.
      mass += in_units((above(v.x) + above(v.y)) + (above(v.z) + above(v.w)));
      ties += (v.x == cut.logit) + (v.y == cut.logit) + (v.z == cut.logit) + (v.w == cut.logit);
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
  // Four tokens are left; every thread looks at them. Their sum may be rounded up: then the last of
  // them that has a weight.
  const float4 v = row.at(begin);
  const float four[4] = {v.x, v.y, v.z, v.w};
  uint32_t found = 4 * begin;
  for (int j = 0; j < 4; j++) {
    uint64_t here = in_units(above(four[j]));
    if (four[j] == cut.logit && cut.ties > 0) here = tie_weight, cut.ties--;
    if (here == 0) continue;
    found = 4 * begin + j;
    if (rest < here) break;
    rest -= here;
  }
  return found;
}

// Weights, without the tokens that min-p drops.
struct AtLeast {
  Softmax softmax;
  float least;
  __device__ __forceinline__ float operator()(float logit) const {
    const float w = softmax.weight(logit);
    return w >= least ? w : 0.f;
  }
};

struct Nothing {
  __device__ __forceinline__ float operator()(float) const { return 0.f; }
};

struct Uniform {
  uint64_t seed;
  uint32_t position;
  __device__ __forceinline__ uint64_t operator()(uint64_t total) const { return draw_below(total, seed, position); }
};

struct Exactly {
  uint64_t rest;
  __device__ __forceinline__ uint64_t operator()(uint64_t) const { return rest; }
};
