// Rotary position embedding (Su et al. 2021), QK norm and the append to the paged KV cache.
//
// rope_rotations: cosine and sine of each token's angles, once per step for all layers. An angle is
// position * rate; the rates (f64, made by the host) hold base, linear scaling, Llama 3's factors or
// YaRN, and `magnitude` is YaRN's attention factor (1 for others). The product is taken and reduced to a
// turn in float64: at position 131,072 a float32 product is wrong by 0.008 radians.
//   positions u32 [n];  rates f64 [pairs];  rotations f32 [n, pairs, 2]
//   Launch: a grid that strides over n * pairs.
//
// qk_norm_rope_append: normalises each query and key head (if there are norms), rotates both,
// writes keys and values to the cache; the queries stay in place.
//   qkv       bf16 [n, (heads + 2 * kv_heads) * head_dim], queries, keys, values
//   q_norm, k_norm  f32 [head_dim] or null
//   common    f32 [kv_heads, head_dim] or null: taken from every rotated key. All scores of a query change by
//             the same number, which the softmax does not see.
//   places    u32 [n]  block * block_size + offset; NOWHERE for padding tokens
//   cache     see kv.cuh
//   A head's first 2 * pairs elements are rotated; pair i is (2i, 2i + 1) if interleaved, else (i, i + pairs).
//   Launch: `group` neighbouring threads per head, each with 16 elements: two vectors that hold whole
//   pairs either way. blockDim.x is a multiple of 32, head_dim and 2 * pairs are multiples of 16.
//   Roofline: 4 bytes per element of qkv.
//
// qk_norm_rope_append_packed: the same for a cache of 8-bit codes. The 16 elements that a thread holds make
// a piece, one behind the other in the order of threads: of keys and of queries alike, whose products so
// stay what they are. With KV_INT8 both are rotated piece by piece.
#include "kv.cuh"
#include "kv_packed.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr uint32_t NOWHERE = 0xffffffffu;

extern "C" __global__ void rope_rotations(const uint32_t* __restrict__ positions, const double* __restrict__ rates,
                                          float magnitude, uint32_t n, uint32_t pairs,
                                          float2* __restrict__ rotations) {
  let_next_start();
  wait_for_previous();
  const uint64_t total = uint64_t(n) * pairs;
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < total;
       i += uint64_t(gridDim.x) * blockDim.x) {
    constexpr double TURN = 6.283185307179586;
    const double angle = positions[i / pairs] * rates[i % pairs];
    float sine, cosine;
    sincosf(float(angle - TURN * floor(angle / TURN)), &sine, &cosine);
    rotations[i] = make_float2(cosine * magnitude, sine * magnitude);
  }
}

__device__ __forceinline__ void rotate(float& a, float& b, float2 by) {
  const float x = a * by.x - b * by.y;
  b = a * by.y + b * by.x;
  a = x;
}

__device__ __forceinline__ void join(const Vec8& a, const Vec8& b, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < VEC; i++) x[i] = a.x[i], x[i + VEC] = b.x[i];
}

__device__ __forceinline__ void part(const float (&x)[16], Vec8& a, Vec8& b) {
#pragma unroll
  for (int i = 0; i < VEC; i++) a.x[i] = x[i], b.x[i] = x[i + VEC];
}

template <bool PACKED>
__device__ __forceinline__ void append(bf16* __restrict__ qkv, const float* __restrict__ q_norm,
                                       const float* __restrict__ k_norm, float eps,
                                       const float2* __restrict__ rotations, uint32_t pairs, bool interleaved,
                                       const float* __restrict__ common,
                                       const uint32_t* __restrict__ places, const KvShape& shape, uint32_t layer,
                                       uint32_t heads, uint32_t n, uint32_t group, uint8_t* __restrict__ cache) {
  let_next_start();
  wait_for_previous();
  const uint32_t all_heads = heads + 2 * shape.kv_heads;
  const uint32_t unit = (blockIdx.x * blockDim.x + threadIdx.x) / group, lane = threadIdx.x % group;
  const uint32_t token = unit / all_heads, head = unit % all_heads;
  // Groups are a power of two; for heads of 96, say, some threads only take part in the reduction.
  const bool active = token < n && lane * 16 < shape.head_dim;
  const bool is_query = head < heads, is_value = head >= heads + shape.kv_heads;

  // Of the rotated part a thread takes vectors that belong together, of the rest any two.
  const uint32_t rotated = 2 * pairs, rotating = rotated / 16;
  const bool rotates = lane < rotating && !is_value;
  uint32_t first = lane * 16, second = first + VEC;
  if (rotates && !interleaved) first = lane * VEC, second = first + pairs;

  bf16* const from = qkv + (size_t(token) * all_heads + head) * shape.head_dim;
  Vec8 a = {}, b = {};
  if (active) a = load8(from + first), b = load8(from + second);
  const uint32_t place = active && !is_query ? places[token] : NOWHERE;  // on its way with them

  const float* norm = is_query ? q_norm : k_norm;
  if (q_norm) {
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < VEC; j++) squares += a.x[j] * a.x[j] + b.x[j] * b.x[j];
    const float scale = rsqrtf(reduce_lanes(squares, Sum{}, group) / shape.head_dim + eps);
    if (active && !is_value) {
      const Vec8 wa = load8(norm + first), wb = load8(norm + second);
#pragma unroll
      for (int j = 0; j < VEC; j++) a.x[j] *= scale * wa.x[j], b.x[j] *= scale * wb.x[j];
    }
  }
  if (active && rotates) {
    const float2* by = rotations + size_t(token) * pairs + lane * VEC;
    if (interleaved) {
#pragma unroll
      for (int j = 0; j < VEC / 2; j++) {
        rotate(a.x[2 * j], a.x[2 * j + 1], by[j]);
        rotate(b.x[2 * j], b.x[2 * j + 1], by[j + VEC / 2]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < VEC; j++) rotate(a.x[j], b.x[j], by[j]);
    }
  }
  if (common && active && !is_query && !is_value) {
    const float* of_head = common + (head - heads) * shape.head_dim;
    const Vec8 ca = load8(of_head + first), cb = load8(of_head + second);
#pragma unroll
    for (int j = 0; j < VEC; j++) a.x[j] -= ca.x[j], b.x[j] -= cb.x[j];
  }
  float largest = 0.f;
  if constexpr (PACKED) {
    float x[16];
    join(a, b, x);
    if (shape.format == KV_INT8 && !is_value) {
      rotate16(x);
      part(x, a, b);
    }
    largest = largest16(x);
    if (shape.scales() == 1) largest = reduce_lanes(largest, Max{}, group);
    first = lane * 16, second = first + VEC;
    __syncwarp();  // queries change places inside their head: all have been read
  }
  if (!active) return;
  if (is_query) {
    store8(from + first, a);
    store8(from + second, b);
    return;
  }
  if (place == NOWHERE) return;
  const uint32_t kv_head = is_value ? head - heads - shape.kv_heads : head - heads;
  uint8_t* const tile =
      cache + shape.key_tile(layer, place / shape.block_size, kv_head) + (is_value ? shape.key_to_value() : 0);
  const uint32_t row = place % shape.block_size;
  if constexpr (PACKED) {
    float x[16], inverse;
    join(a, b, x);
    const bf16 scale = find_scale(largest, shape.format, inverse);
    *reinterpret_cast<uint4*>(tile + row * shape.head_dim + lane * 16) = pack16(x, inverse, shape.format);
    bf16* const scales = reinterpret_cast<bf16*>(tile + shape.block_size * shape.head_dim) + row * shape.scales();
    if (shape.scales() > 1 || lane == 0) scales[shape.scales() > 1 ? lane : 0] = scale;
  } else {
    bf16* const to = reinterpret_cast<bf16*>(tile) + row * shape.head_dim;
    store8(to + first, a);
    store8(to + second, b);
  }
}

#define APPEND(name, packed)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256)                                                              \
      name(bf16* __restrict__ qkv, const float* __restrict__ q_norm, const float* __restrict__ k_norm, float eps, \
           const float2* __restrict__ rotations, uint32_t pairs, bool interleaved,                               \
           const float* __restrict__ common, const uint32_t* __restrict__ places,                                \
           const __grid_constant__ KvShape shape, uint32_t layer, uint32_t heads, uint32_t n, uint32_t group,    \
           uint8_t* __restrict__ cache) {                                                                        \
    append<packed>(qkv, q_norm, k_norm, eps, rotations, pairs, interleaved, common, places, shape, layer, heads, \
                   n, group, cache);                                                                             \
  }

APPEND(qk_norm_rope_append, false)
APPEND(qk_norm_rope_append_packed, true)
