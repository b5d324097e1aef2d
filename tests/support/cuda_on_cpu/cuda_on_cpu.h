// Kernels on the CPU: enough of CUDA to compile a kernel's own source with a host compiler and run it, a block of threads at a time.
//
// A thread of a block is a fibre. Whatever the threads of a block or a warp do together (__syncthreads, shuffles) ends a turn: all
// take turns, so that a thread goes on once all others came as far. That is right for kernels whose warps do not diverge around
// such calls; it says nothing about races, memory ordering or speed. Stand-ins for the headers that use PTX lie beside this.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "../fibres.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // blocks run one after the other, or (a grid with a barrier) each in a thread of the host

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx, gridDim, blockDim;

template <typename T> T max(T a, T b) { return a < b ? b : a; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
inline float __uint_as_float(uint32_t bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline uint32_t __float_as_uint(float v) { uint32_t bits; std::memcpy(&bits, &v, 4); return bits; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __ldcg(const float* p) { return *p; }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;

struct Block {
  std::vector<Fibre> fibres;
  std::vector<bool> ended;
  std::vector<uint64_t> given;  // by each thread, to a shuffle
  jmp_buf scheduler;
  unsigned running = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::exception_ptr failure;
};
inline thread_local Block* current = nullptr;

inline void end_turn() { leave(current->fibres[current->running], current->scheduler); }

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
  char* const stacks = stacks_of(threads * kStack);
  current = &block;
  for (unsigned i = 0; i < threads; ++i) make_fibre(block.fibres[i], &stacks[i * kStack], kStack, start);
  for (unsigned left = threads; left > 0;) {
    for (unsigned i = 0; i < threads; ++i) {
      if (block.ended[i]) continue;
      block.running = i;
      threadIdx = dim3(i, 0, 0);
      resume(block.fibres[i], block.scheduler);
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

// A grid whose blocks wait for each other: a host thread a block, of which one runs at a time.
struct Grid {
  std::mutex running;
  std::condition_variable all_there;
  unsigned blocks = 0, there = 0, barriers = 0;
  std::exception_ptr failure;
};
inline thread_local Grid* grid_of_block = nullptr;
inline thread_local std::unique_lock<std::mutex>* turn_of_block = nullptr;
inline thread_local char* dynamic_shared = nullptr;

inline void grid_barrier() {
  end_turn();
  if (threadIdx.x == 0) {
    Grid& grid = *grid_of_block;
    const unsigned mine = grid.barriers;
    if (++grid.there == grid.blocks) {
      grid.there = 0, ++grid.barriers;
      grid.all_there.notify_all();
    } else {
      grid.all_there.wait(*turn_of_block, [&] { return grid.barriers != mine || grid.failure; });
    }
  }
  end_turn();
  if (grid_of_block->failure) throw std::runtime_error("another block failed");
}

template <typename... Params, typename... Args>
void run_grid_at_once(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Params...), Args&&... args) {
  Grid shared;
  shared.blocks = grid.x;
  std::vector<std::thread> threads;
  for (unsigned x = 0; x < grid.x; ++x) {
    threads.emplace_back([&, x] {
      std::unique_lock<std::mutex> turn(shared.running);
      const std::unique_ptr<char, void (*)(void*)> bytes(static_cast<char*>(std::aligned_alloc(128, shared_bytes / 128 * 128 + 128)), std::free);
      std::memset(bytes.get(), 0xff, shared_bytes);
      grid_of_block = &shared, turn_of_block = &turn, dynamic_shared = bytes.get();
      gridDim = grid, blockDim = block, blockIdx = dim3(x);
      auto call = [&] { kernel(args...); };
      try {
        run_block(block.x, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
      } catch (...) {
        if (!shared.failure) shared.failure = std::current_exception();
        shared.all_there.notify_all();
      }
    });
  }
  for (std::thread& each : threads) each.join();
  if (shared.failure) std::rethrow_exception(shared.failure);
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
inline void __syncwarp() { cuda_on_cpu::end_turn(); }
inline int __syncthreads_or(int value) {  // all threads of the block are there
  auto& given = cuda_on_cpu::current->given;
  given[cuda_on_cpu::current->running] = value != 0;
  cuda_on_cpu::end_turn();
  const int found = std::count(given.begin(), given.end(), 1u) > 0;
  cuda_on_cpu::end_turn();
  return found;
}
template <typename T> T __shfl_sync(unsigned, T value, int lane) { return cuda_on_cpu::exchange(value, lane); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int step) { return cuda_on_cpu::exchange(value, threadIdx.x % 32 ^ step); }
template <typename T> T __shfl_up_sync(unsigned, T value, int step) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_cpu::exchange(value, lane < static_cast<unsigned>(step) ? lane : lane - step);
}
template <typename T> T atomicMin(T* at, T value) { return std::exchange(*at, min(*at, value)); }
inline unsigned atomicOr(unsigned* at, unsigned bits) { return std::exchange(*at, *at | bits); }
inline void __nanosleep(unsigned) {}
