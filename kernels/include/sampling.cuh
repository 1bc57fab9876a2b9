// What the sampler reads and writes; the host has the same structs.
#pragma once
#include <cstdint>

constexpr uint32_t NONE = 0xffffffffu;

// Widest logits.
constexpr uint32_t MAX_VOCAB = 500000;

// From a slot's counts to the next one's: four tokens' counts are read at a time.
__host__ __device__ constexpr uint32_t counts_stride(uint32_t vocab) { return (vocab + 3) / 4 * 4; }

// Most alternatives that logprobs name.
constexpr int MAX_TOP = 32;

// Most logit biases, and most banned ids, of one sequence: one and two for each thread.
constexpr int MAX_BIASES = 1024, MAX_BANS = 2048;

// How a slot's sequence samples; written when it is bound.
struct SlotParams {
  float inv_temperature;  // 0: greedy
  float top_p;            // 1: all
  float min_p;            // 0: all
  uint32_t top_k;         // 0: all
  float repetition_penalty;
  float presence_penalty;
  float frequency_penalty;
  uint32_t has_penalties;  // whether the slot's counts are kept
  uint32_t biases;         // of its edits, those that always count …
  uint32_t bans;           // … and after them, those that count below min_tokens: their bias is -inf
  uint32_t min_tokens;
  uint32_t top_logprobs;         // for sampled tokens; NONE: no logprobs
  uint32_t prompt_top_logprobs;  // for prompt tokens
  uint32_t padding;
  uint64_t seed;
};

// Added to the logit of a token.
struct Edit {
  uint32_t token;
  float bias;
};

// A position that wants logits.
struct Want {
  uint32_t slot;      // NONE: padding, nothing to do
  uint32_t row;       // of the batch
  uint32_t position;  // of the token that comes next
  uint32_t target;    // the prompt token that comes next, if its logprob is wanted, else NONE
  uint32_t sample;    // whether to choose the token that comes next
  uint32_t mask;      // which of the step's masks says what may be chosen, or NONE
};

// A chosen token or a prompt token.
struct Chosen {
  int32_t token;  // -1: the row has failed, or nothing was asked for
  float logprob;
  uint32_t rank;  // 1 for the most likely
  uint32_t tops;  // how many alternatives follow in `tops`
};

struct Top {
  uint32_t token;
  float logprob;
};
