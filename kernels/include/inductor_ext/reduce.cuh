// amax = max |x| with NaN propagating, and sums, over a vector, a group of lanes, a block. A maximum is exact: it has no rounding.
// Absolute values are reduced as the bits of non-negative floats: they order like unsigned integers, and NaN is above infinity.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

// max |x| of a vector's elements, merged into two packed 16-bit maxima or one fp32 maximum.
template <typename T>
struct Amax;

template <>
struct Amax<float> {
  uint32_t bits = 0;
  template <int N>
  __device__ __forceinline__ void merge(const Raw<float, N>& x) {
#pragma unroll
    for (int i = 0; i < N; ++i) bits = max(bits, x.words[i] & 0x7fffffffu);
  }
  __device__ __forceinline__ uint32_t float_bits() const { return bits; }
};

template <>
struct Amax<__nv_bfloat16> {
  uint32_t packed = 0;
  template <int N>
  __device__ __forceinline__ void merge(const Raw<__nv_bfloat16, N>& x) {
#pragma unroll
    for (int i = 0; i < (N + 1) / 2; ++i) {
      asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(packed) : "r"(x.words[i] & 0x7fff7fffu));
    }
  }
  __device__ __forceinline__ uint32_t float_bits() const { return max(packed << 16, packed & 0xffff0000u); }
};

template <>
struct Amax<__half> {
  uint32_t packed = 0;
  template <int N>
  __device__ __forceinline__ void merge(const Raw<__half, N>& x) {
#pragma unroll
    for (int i = 0; i < (N + 1) / 2; ++i) {
      asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(packed) : "r"(x.words[i] & 0x7fff7fffu));
    }
  }
  __device__ __forceinline__ uint32_t float_bits() const {
    uint32_t low = __float_as_uint(__half2float(__ushort_as_half(static_cast<unsigned short>(packed))));
    uint32_t high = __float_as_uint(__half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16))));
    return max(low, high);
  }
};

// Over groups of `Lanes` consecutive lanes; every lane of the warp takes part and every lane of a group gets its maximum.
template <int Lanes>
__device__ __forceinline__ uint32_t group_max(uint32_t bits) {
  if constexpr (Lanes == 32) {
    return __reduce_max_sync(0xffffffffu, bits);
  } else {
#pragma unroll
    for (int step = Lanes / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
    return bits;
  }
}

// Over the block, to every thread. `shared` has one word a warp. A second call needs a __syncthreads() between.
template <int Threads>
__device__ __forceinline__ uint32_t block_max(uint32_t bits, uint32_t* shared) {
  constexpr int kWarps = Threads / 32;
  bits = group_max<32>(bits);
  if constexpr (kWarps == 1) return bits;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = bits;
  __syncthreads();
  bits = 0;
  if constexpr (kWarps <= 4) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) bits = max(bits, shared[i]);
    return bits;
  } else {
    return group_max<32>(threadIdx.x % 32 < kWarps ? shared[threadIdx.x % 32] : 0);
  }
}

// Sums, in an order that does not change from run to run; every lane of a group, or every thread, gets the whole.
template <int Lanes>
__device__ __forceinline__ float group_sum(float value) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Over a block of whole warps, however many. `shared` has 32 words. A second call needs a __syncthreads() between.
__device__ __forceinline__ float block_sum(float value, float* shared) {
  value = group_sum<32>(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  return group_sum<32>(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f);
}
// Over each part of a block, `threads` of it, in block_sum's order. At most 15 parts.
__device__ __forceinline__ float part_sum(float value, int threads, float* shared) {
  const int part = threadIdx.x / threads, warps = threads / 32, lane = threadIdx.x % 32;
  value = group_sum<32>(value);
  if (lane == 0) shared[threadIdx.x / 32] = value;
  asm volatile("bar.sync %0, %1;" ::"r"(1 + part), "r"(threads) : "memory");  // barrier 0 is __syncthreads()'s
  return group_sum<32>(lane < warps ? shared[part * warps + lane] : 0.0f);
}
__device__ __forceinline__ uint32_t part_max(uint32_t bits, int threads, uint32_t* shared) {
  const int part = threadIdx.x / threads, warps = threads / 32, lane = threadIdx.x % 32;
  bits = group_max<32>(bits);
  if (lane == 0) shared[threadIdx.x / 32] = bits;
  asm volatile("bar.sync %0, %1;" ::"r"(1 + part), "r"(threads) : "memory");
  return group_max<32>(lane < warps ? shared[part * warps + lane] : 0);
}
__device__ __forceinline__ uint32_t block_max(uint32_t bits, uint32_t* shared) {
  bits = group_max<32>(bits);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = bits;
  __syncthreads();
  return group_max<32>(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0);
}

}  // namespace inductor_ext
