// Kernels on the CPU: enough of CUDA to compile a kernel's own source with a host compiler and run it, a block of threads at a time.
//
// A thread of a block is a fibre. Whatever the threads of a block or a warp do together (__syncthreads, shuffles) ends a turn: all
// take turns, so that a thread goes on once all others came as far. That is right for kernels whose warps do not diverge around
// such calls; it says nothing about races, memory ordering or speed. Stand-ins for the headers that use PTX lie beside this.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim, blockDim;

template <typename T> T max(T a, T b) { return a < b ? b : a; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
inline float __uint_as_float(uint32_t bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline uint32_t __float_as_uint(float v) { uint32_t bits; std::memcpy(&bits, &v, 4); return bits; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;

struct Block {
  std::vector<ucontext_t> fibres;
  std::vector<bool> ended;
  std::vector<uint64_t> given;  // by each thread, to a shuffle
  ucontext_t scheduler;
  unsigned running = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::exception_ptr failure;
};
inline Block* current = nullptr;

inline void end_turn() { swapcontext(&current->fibres[current->running], &current->scheduler); }

inline void start() {
  try {
    current->body(current->argument);
  } catch (...) {  // it cannot leave a fibre
    current->failure = std::current_exception();
  }
  current->ended[current->running] = true;
  end_turn();
}

inline void run_block(unsigned threads, void (*body)(void*), void* argument) {
  Block block;
  block.fibres.resize(threads), block.ended.assign(threads, false), block.given.assign(threads, 0);
  block.body = body, block.argument = argument;
  const auto stacks = std::make_unique<char[]>(threads * kStack);
  current = &block;
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&block.fibres[i]);
    block.fibres[i].uc_stack = {&stacks[i * kStack], 0, kStack};
    block.fibres[i].uc_link = nullptr;
    makecontext(&block.fibres[i], start, 0);
  }
  for (unsigned left = threads; left > 0;) {
    for (unsigned i = 0; i < threads; ++i) {
      if (block.ended[i]) continue;
      block.running = i;
      threadIdx = dim3(i, 0, 0);
      swapcontext(&block.scheduler, &block.fibres[i]);
      left -= block.ended[i];
    }
  }
  if (block.failure) std::rethrow_exception(block.failure);
}

template <typename... Params, typename... Args>
void run_grid(dim3 grid, dim3 block, void (*kernel)(Params...), Args&&... args) {
  auto call = [&] { kernel(args...); };
  gridDim = grid, blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(block.x, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
    }
  }
}

// The value that lane `from` of this thread's warp gave; every lane gives one.
template <typename T>
T exchange(T value, unsigned from) {
  const unsigned me = current->running;
  std::memcpy(&current->given[me], &value, sizeof(T));
  end_turn();
  T result;
  std::memcpy(&result, &current->given[me / 32 * 32 + from % 32], sizeof(T));
  end_turn();
  return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::end_turn(); }
template <typename T> T __shfl_sync(unsigned, T value, int lane) { return cuda_on_cpu::exchange(value, lane); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int step) { return cuda_on_cpu::exchange(value, threadIdx.x % 32 ^ step); }
template <typename T> T __shfl_up_sync(unsigned, T value, int step) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_cpu::exchange(value, lane < static_cast<unsigned>(step) ? lane : lane - step);
}
