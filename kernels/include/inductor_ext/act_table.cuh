// GELU and its like of bf16, read off a table in shared memory: seven instructions a value, where erf or tanh takes thirty.
//
// For every |x| from 2^-10 up to a power of two, and both signs, the table holds by how much the bits of y exceed those of x / 2. The
// function that it stands for fills it, so that y is the same to the last bit. Below the table y is x / 2, above it x or -0; a vector
// with an infinity or a NaN in it is computed.
//
// Filling it costs a block of 1024 threads half a microsecond, of which the kernel ahead hides some: for blocks that stay.
#pragma once

#include "inductor_ext/activation.cuh"
#include "inductor_ext/packed.cuh"

namespace inductor_ext {

template <typename Act>
constexpr int kTableTo = 0;  // the exponent at which the table ends; 0: none
template <>
constexpr int kTableTo<Gelu> = 3;
template <>
constexpr int kTableTo<GeluTanh> = 3;
template <>
constexpr int kTableTo<QuickGelu> = 6;

template <typename Act>
struct ActTable {
  using In = __nv_bfloat16;
  static constexpr uint32_t kOne = 127 << 7;  // bits of 1.0
  static constexpr uint32_t kFirst = kOne - (10 << 7), kEnd = kOne + (kTableTo<Act> << 7);
  static constexpr uint32_t kEntries = kEnd - kFirst + 2;  // from 2^-10 to the end, both included, behind one for all below
  uint32_t entries[kEntries];                              // of x in the low half, of -x in the high one

  // By all threads of a block, which then have to meet.
  __device__ __forceinline__ void fill() {
    for (uint32_t i = threadIdx.x; i < kEntries; i += blockDim.x) {
      const uint32_t x = packed::twice(i == 0 ? 0 : kFirst + i - 1) | 0x80000000u;
      Raw<In, 2> y, half;
      y.words[0] = x, half.words[0] = x;
      compute(y);
      half.multiply(one_half<2>());
      const uint32_t a = y.words[0], b = half.words[0];
      entries[i] = (a - b & 0xffffu) | ((a >> 16) - (b >> 16)) << 16;
    }
  }

  template <int E>
  __device__ __forceinline__ void apply(Raw<In, E>& y) const {
    Raw<In, E> result;
    uint32_t most = 0;
#pragma unroll
    for (int w = 0; w < Raw<In, E>::kWords; ++w) result.words[w] = packed::maximum(y.words[w], packed::twice(0x8000u | kEnd));
    result.multiply(one_half<E>());
#pragma unroll
    for (int w = 0; w < Raw<In, E>::kWords; ++w) {
      const uint32_t x = y.words[w], magnitude = x & 0x7fff7fffu;
      most = packed::larger(most, magnitude);
      const uint32_t entry = packed::sum_within(magnitude, packed::twice(1 - kFirst), packed::twice(kEntries - 1));
      const uint32_t at = entry << 2 | (x >> 14 & 0x00020002u);
      result.words[w] = packed::sum(result.words[w], excess(at & 0xffffu) | excess(at >> 16) << 16);
    }
    constexpr uint32_t kInfinity = 0xffu << 7;
    if ((most & 0xffffu) >= kInfinity || most >= kInfinity << 16) {
      compute(y);
    } else {
      y = result;
    }
  }

 private:
  __device__ __forceinline__ uint32_t excess(uint32_t byte) const {
    return *reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(entries) + byte);
  }
  template <int E>
  __device__ static __forceinline__ void compute(Raw<In, E>& y) {
    float v[E];
    y.unpack(v);
    Act::template apply<In>(v);
    y.pack(v);
  }
  template <int E>
  __device__ static __forceinline__ Raw<In, E> one_half() {
    Raw<In, E> result;
#pragma unroll
    for (int w = 0; w < Raw<In, E>::kWords; ++w) result.words[w] = packed::twice(0x3f00u);
    return result;
  }
};

// How a form uses the table of the activation in it: none for most.
template <typename Form>
struct Tabled {
  static constexpr bool kThere = false;
};
template <typename Act>
struct Tabled<Alone<Act>> {
  static constexpr bool kThere = kTableTo<Act> != 0;
  using Table = ActTable<Act>;
  template <int E>
  __device__ static __forceinline__ void apply(const Table& table, Raw<__nv_bfloat16, E>& y, const Raw<__nv_bfloat16, E>&) {
    table.apply(y);
  }
};
template <typename Act>
struct Tabled<Gated<Act>> {
  static constexpr bool kThere = kTableTo<Act> != 0;
  using Table = ActTable<Act>;
  template <int E>
  __device__ static __forceinline__ void apply(const Table& table, Raw<__nv_bfloat16, E>& y, const Raw<__nv_bfloat16, E>& up) {
    table.apply(y);
    y.multiply(up);
  }
};
template <>
struct Tabled<ClampedSwiglu> {
  static constexpr bool kThere = true;
  using Table = ActTable<QuickGelu>;
  template <int E>
  __device__ static __forceinline__ void apply(const Table& table, Raw<__nv_bfloat16, E>& y, const Raw<__nv_bfloat16, E>& up) {
    constexpr uint32_t kLimit = packed::twice(0x40e0u), kBelow = kLimit | 0x80008000u;  // 7, -7
    Raw<__nv_bfloat16, E> factor, one;
#pragma unroll
    for (int w = 0; w < Raw<__nv_bfloat16, E>::kWords; ++w) {
      y.words[w] = packed::minimum_or_nan(y.words[w], kLimit);
      factor.words[w] = packed::minimum_or_nan(packed::maximum_or_nan(up.words[w], kBelow), kLimit);
      one.words[w] = packed::twice(0x3f80u);
    }
    table.apply(y);
    factor.add(one);
    y.multiply(factor);
  }
};

}  // namespace inductor_ext
