// Stand-in for launches: the grid runs at once, one cluster after the other.
#pragma once

#include "hopper_on_cpu.h"

enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel> int cudaFuncSetAttribute(Kernel*, int, int) { return 0; }

namespace inductor_ext {

inline void check_cuda(int, const char*) {}
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
struct OncePerDevice {
  template <typename F> void run(int, F&& f) { f(); }
};
inline void* env_stream(int) { return nullptr; }
inline int multiprocessors = 2;
inline int sm_count(int) { return multiprocessors; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Launch {
  Launch(unsigned grid, unsigned block) : grid(grid), block(block) {}
  Launch& stream(void*) { return *this; }
  Launch& programmatic() { return *this; }
  Launch& cluster(unsigned count) {
    ctas = count;
    return *this;
  }
  Launch& shared_memory(size_t bytes) {
    if (bytes > kSharedBytes) hopper_on_cpu::fail("more shared memory than a CTA may have");
    return *this;
  }
  template <typename... Params, typename... Args>
  void run(void (*kernel)(Params...), Args&&... args) { hopper_on_cpu::run_grid(grid, ctas, block, kernel, std::forward<Args>(args)...); }
  unsigned grid, block, ctas = 1;
};

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

}  // namespace inductor_ext
