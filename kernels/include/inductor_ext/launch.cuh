// Kernel launches: on torch's current stream, on the tensors' device, with errors turned into exceptions.
//
//   DeviceGuard guard(device.id());
//   Launch(grid, block).stream(env_stream(device.id())).programmatic().run(kernel<...>, params);
//
// A grid with a zero size launches nothing. `programmatic()` lets the kernel start before the one ahead of it in the stream has
// ended; it must then call wait_for_previous_kernel() before it touches what that one writes.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <atomic>
#include <cstdlib>
#include <string_view>
#include <utility>

namespace inductor_ext {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // leave no error behind for the next caller
    TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorName(error) << ": " << cudaGetErrorString(error);
  }
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    switched_ = previous_ != device;
    if (switched_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool switched_ = false;
};

inline cudaStream_t env_stream(int device) { return static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device)); }

inline int sm_count(int device) {
  constexpr int kCached = 64;
  static std::atomic<int> counts[kCached];
  int count = device < kCached ? counts[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    if (device < kCached) counts[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Runs something once for each device, such as setting an attribute of a kernel. Twice, if two threads come first together.
class OncePerDevice {
 public:
  template <typename F>
  void run(int device, F&& f) {
    if (device < kDevices && done_[device].load(std::memory_order_acquire)) return;
    f();
    if (device < kDevices) done_[device].store(true, std::memory_order_release);
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<bool> done_[kDevices] = {};
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// INDUCTOR_EXT_PDL=0 turns programmatic dependent launch off, to measure what it gives; read once a process.
inline bool programmatic_launch_enabled() {
  static const bool enabled = [] {
    const char* text = std::getenv("INDUCTOR_EXT_PDL");
    return text == nullptr || std::string_view(text) != "0";
  }();
  return enabled;
}

class Launch {
 public:
  Launch(dim3 grid, dim3 block) {
    config_.gridDim = grid;
    config_.blockDim = block;
    config_.attrs = attributes_;
  }
  Launch& stream(cudaStream_t stream) {
    config_.stream = stream;
    return *this;
  }
  Launch& shared_memory(size_t bytes) {
    config_.dynamicSmemBytes = bytes;
    return *this;
  }
  Launch& programmatic() {
    if (!programmatic_launch_enabled()) return *this;
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return *this;
  }
  Launch& cluster(unsigned x, unsigned y = 1, unsigned z = 1) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = x, attribute.val.clusterDim.y = y, attribute.val.clusterDim.z = z;
    return *this;
  }
  // All blocks are resident at once, or nothing is launched: a grid of them may wait for each other.
  Launch& cooperative() {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    return *this;
  }
  template <typename... Params, typename... Args>
  void run(void (*kernel)(Params...), Args&&... args) {
    if (config_.gridDim.x == 0 || config_.gridDim.y == 0 || config_.gridDim.z == 0) return;
    check_cuda(cudaLaunchKernelEx(&config_, kernel, std::forward<Args>(args)...), "kernel launch");
  }
  // False where a cooperative grid does not fit, as on a part of the device's SMs.
  template <typename... Params, typename... Args>
  bool run_if_it_fits(void (*kernel)(Params...), Args&&... args) {
    const cudaError_t error = cudaLaunchKernelEx(&config_, kernel, std::forward<Args>(args)...);
    if (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorNotSupported) check_cuda(error, "kernel launch");
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess;
  }

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute attributes_[3] = {};
};

// What Launch::shared_memory asked for, device side.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 words[];
  return reinterpret_cast<T*>(words);
}

// Programmatic dependent launch, device side. Both do nothing where the hardware or the launch does not have it.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace inductor_ext
