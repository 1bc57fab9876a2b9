// PTX instructions that C++ has no word for.
#pragma once
#include <cstdint>

// Programmatic dependent launch: with it a kernel starts while its predecessor is still finishing.
// Every kernel calls `wait_for_previous` before it reads or writes anything that another kernel
// touches, and `let_next_start` as soon as its own blocks hold all the resources they will need.
// The portable PTX (8.0) has neither: there the host never asks for an early start.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A read of data that is used once: it does not push useful lines out of the caches.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
