// A barrier of all blocks of a grid: what each wrote to memory before it, all read after it.
//
// The grid is one cluster (at most eight blocks; the hardware's barrier, a launch like any other) or a cooperative launch, which
// starts when all its blocks have room. Every thread of every block calls it.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace inductor_ext {

__device__ __forceinline__ void grid_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  if (blocks == gridDim.x) {
    __threadfence();
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    return;
  }
#endif
  cooperative_groups::this_grid().sync();
}

}  // namespace inductor_ext
