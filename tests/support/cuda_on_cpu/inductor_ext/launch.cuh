// Stand-in for launches: the grid runs at once.
#pragma once

#include "cuda_on_cpu.h"

using cudaStream_t = void*;

namespace inductor_ext {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline cudaStream_t env_stream(int) { return nullptr; }
inline int multiprocessors = 132;
inline int sm_count(int) { return multiprocessors; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Launch {
  Launch(dim3 grid, dim3 block) : grid(grid), block(block) {}
  Launch& stream(cudaStream_t) { return *this; }
  Launch& programmatic() { return *this; }
  template <typename... Params, typename... Args>
  void run(void (*kernel)(Params...), Args&&... args) {
    cuda_on_cpu::run_grid(grid, block, kernel, std::forward<Args>(args)...);
  }
  dim3 grid, block;
};

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

}  // namespace inductor_ext
