// Stand-in for the reductions: bits of non-negative floats, NaN above infinity.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

template <typename T>
struct Amax {
  uint32_t bits = 0;
  template <int N>
  void merge(const Raw<T, N>& x) {
    for (int i = 0; i < N; ++i) bits = max(bits, __float_as_uint(to_float(x.values[i])) & 0x7fffffffu);
  }
  uint32_t float_bits() const { return bits; }
};

template <int Lanes>
uint32_t group_max(uint32_t bits) {
  for (int step = Lanes / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
  return bits;
}

template <int Lanes>
float group_sum(float value) {
  for (int step = Lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

inline float part_sum(float value, int threads, float* shared) {
  const int part = threadIdx.x / threads, warps = threads / 32, lane = threadIdx.x % 32;
  value = group_sum<32>(value);
  if (lane == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();  // of the part only, on a GPU
  return group_sum<32>(lane < warps ? shared[part * warps + lane] : 0.0f);
}
inline float block_sum(float value, float* shared) { return part_sum(value, blockDim.x, shared); }

inline uint32_t part_max(uint32_t bits, int threads, uint32_t* shared) {
  const int part = threadIdx.x / threads, warps = threads / 32, lane = threadIdx.x % 32;
  bits = group_max<32>(bits);
  if (lane == 0) shared[threadIdx.x / 32] = bits;
  __syncthreads();
  return group_max<32>(lane < warps ? shared[part * warps + lane] : 0);
}
inline uint32_t block_max(uint32_t bits, uint32_t* shared) { return part_max(bits, blockDim.x, shared); }
template <int Threads>
uint32_t block_max(uint32_t bits, uint32_t* shared) { return block_max(bits, shared); }

}  // namespace inductor_ext
