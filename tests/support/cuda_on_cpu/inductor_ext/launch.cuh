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
inline int blocks_of_sm = 2, launches = 0;  // how many fit, which a test sets; what there were
inline int shared_of_sm = 228 << 10;
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Launch {
  Launch(dim3 grid, dim3 block) : grid(grid), block(block) {}
  Launch& stream(cudaStream_t) { return *this; }
  Launch& programmatic() { return *this; }
  Launch& shared_memory(size_t bytes) {
    shared = bytes;
    return *this;
  }
  Launch& cooperative() {
    at_once = true;
    return *this;
  }
  Launch& cluster(unsigned blocks) {
    at_once = blocks == grid.x && (blocks & (blocks - 1)) == 0 && blocks <= 8;
    return *this;
  }
  template <typename... Params, typename... Args>
  void run(void (*kernel)(Params...), Args&&... args) {
    ++launches;
    if (!at_once && shared == 0) return cuda_on_cpu::run_grid(grid, block, kernel, std::forward<Args>(args)...);
    cuda_on_cpu::run_grid_at_once(grid, block, shared, kernel, std::forward<Args>(args)...);
  }
  template <typename... Params, typename... Args>
  bool run_if_it_fits(void (*kernel)(Params...), Args&&... args) {
    const bool fits = grid.x <= static_cast<unsigned>(blocks_of_sm * multiprocessors);
    if (fits) run(kernel, std::forward<Args>(args)...);
    return fits;
  }
  dim3 grid, block;
  size_t shared = 0;
  bool at_once = false;
};

template <typename T>
T* dynamic_shared_memory() { return reinterpret_cast<T*>(cuda_on_cpu::dynamic_shared); }

struct OncePerDevice {
  template <typename F>
  void run(int, F&& f) { f(); }
};
inline void check_cuda(int, const char*) {}
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

}  // namespace inductor_ext

// What a plan of resident blocks asks the runtime for.
enum cudaDeviceAttr {
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
  size_t sharedSizeBytes = 128;
};
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {1, inductor_ext::shared_of_sm, 1 << 10, inductor_ext::shared_of_sm - (1 << 10)};
  *value = values[which];
  return 0;
}
template <typename Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) { return 0; }
template <typename Kernel>
int cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) { return 0; }
template <typename Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, unsigned, size_t shared) {
  *blocks = std::min<int>(inductor_ext::blocks_of_sm, inductor_ext::shared_of_sm / (shared + 1152));
  return 0;
}

// What a look at what a kernel noted asks the runtime for.
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost, cudaMemcpyHostToDevice };
inline int cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return 0;
}
inline int cudaStreamSynchronize(cudaStream_t) { return 0; }
inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return 0;
}
template <typename T>
int cudaMemcpyFromSymbolAsync(void* to, const T& symbol, size_t bytes, size_t, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, &symbol, bytes);
  return 0;
}
template <typename T>
int cudaMemcpyToSymbolAsync(T& symbol, const void* from, size_t bytes, size_t, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(&symbol, from, bytes);
  return 0;
}
