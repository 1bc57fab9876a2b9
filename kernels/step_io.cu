// A step's description on its way to the GPU and its results on their way back, by kernels that read and
// write page-locked host memory: as parts of a captured graph they cost one launch each, less than a
// copy by the copy engine, and the host sees a step's end without asking the driver.
//
// The host has a ring of two buffers each way and uses them in turn. Whose turn it is, is counted here, so
// that a graph serves both.
//
// fetch_step: copies the description. Launch: any grid of 256 threads.
//   from   the two buffers of the host, vectors of 16 bytes [n];  to  [n]
// fetch_masks: waits until the host has written the step's masks, if it has any, and copies them. They may
//   depend on the token before: the host writes them while the step's forward pass runs. Launch: any grid
//   that fits on the GPU at once.
//   description  begins with the step's ticket and the number of its masks
//   from   the two buffers of the host: the ticket of the step whose masks follow at MASKS_AT, each of
//          `words` words;  to  u32 [masks, words]
// deliver_step: copies the results, then says that they are there. Launch: any grid of 256 threads.
//   description  begins with the step's ticket
//   to      the two buffers of the host: Done, then, at the given offsets, failed, chosen and tops
//   failed  u32 [rows];  chosen  [results];  tops  [results][MAX_TOP], of which as many as `chosen` says
//
// Roofline: latency of the bus, about 1.5 us; 55 GB/s.
#include "ptx.cuh"
#include "sampling.cuh"

struct Turn {
  uint32_t steps;    // delivered so far
  uint32_t arrived;  // blocks that have delivered their part; zero between steps
  uint64_t started;  // device clock
};

// What the host looks at.
struct Done {
  uint64_t started, ended;  // device clock, nanoseconds
  uint64_t ticket;          // written last
};

struct Results {
  uint32_t rows, results;
  uint32_t chosen_at, tops_at;  // bytes from the buffer's start, multiples of 16
};

constexpr uint32_t FAILED_AT = 256, MASKS_AT = 256;
static_assert(MAX_TOP == 32, "a lane per alternative");

__device__ __forceinline__ uint64_t device_clock() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

__device__ __forceinline__ uint4 load_from_host(const uint4* p) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

extern "C" __global__ void fetch_step(const uint4* from_even, const uint4* from_odd, uint32_t n, Turn* turn,
                                      uint4* __restrict__ to) {
  let_next_start();
  wait_for_previous();
  const uint4* const from = turn->steps % 2 == 0 ? from_even : from_odd;
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  if (first == 0) turn->started = device_clock();
#pragma unroll 4
  for (uint32_t i = first; i < n; i += gridDim.x * blockDim.x) to[i] = load_from_host(from + i);
}

extern "C" __global__ void fetch_masks(const uint64_t* __restrict__ description, const uint8_t* from_even,
                                       const uint8_t* from_odd, uint32_t words, const Turn* turn, uint32_t* to) {
  let_next_start();
  wait_for_previous();
  const uint32_t masks = uint32_t(description[1]);
  if (masks == 0) return;
  const uint8_t* const from = turn->steps % 2 == 0 ? from_even : from_odd;
  if (threadIdx.x == 0) {
    while (*reinterpret_cast<const volatile uint64_t*>(from) != description[0]) __nanosleep(500);
    __threadfence_system();
  }
  __syncthreads();
  const auto* const all = reinterpret_cast<const volatile uint32_t*>(from + MASKS_AT);
#pragma unroll 4
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < masks * words; i += gridDim.x * blockDim.x) {
    to[i] = all[i];
  }
}

extern "C" __global__ void deliver_step(const uint64_t* __restrict__ description, Results which,
                                        const uint32_t* __restrict__ failed, const Chosen* __restrict__ chosen,
                                        const Top* __restrict__ tops, Turn* turn, uint8_t* to_even,
                                        uint8_t* to_odd) {
  let_next_start();
  wait_for_previous();
  uint8_t* const to = turn->steps % 2 == 0 ? to_even : to_odd;
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
  auto* const to_failed = reinterpret_cast<uint32_t*>(to + FAILED_AT);
  for (uint32_t i = first; i < which.rows; i += stride) to_failed[i] = failed[i];
  auto* const to_chosen = reinterpret_cast<uint4*>(to + which.chosen_at);
  for (uint32_t i = first; i < which.results; i += stride) {
    to_chosen[i] = reinterpret_cast<const uint4*>(chosen)[i];
  }
  // A warp per result: most have no alternatives.
  auto* const to_tops = reinterpret_cast<uint2*>(to + which.tops_at);
  for (uint32_t i = first / 32; i < which.results; i += stride / 32) {
    const uint32_t at = i * MAX_TOP + threadIdx.x % 32;
    if (threadIdx.x % 32 < chosen[i].tops) to_tops[at] = reinterpret_cast<const uint2*>(tops)[at];
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(&turn->arrived, 1) != gridDim.x - 1) return;
  turn->arrived = 0;
  turn->steps += 1;
  __threadfence_system();
  auto* const done = reinterpret_cast<volatile Done*>(to);
  done->started = turn->started;
  done->ended = device_clock();
  __threadfence_system();
  done->ticket = *description;
}
