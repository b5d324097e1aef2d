// fp32 to FP8 as PyTorch casts (c10/util/Float8_e4m3fn.h, Float8_e5m2.h): round to nearest even, NaN stays NaN, and
//   e4m3fn  |v| > 464      -> NaN   (464 itself ties down to 448)
//   e5m2    |v| >= 61440   -> ±inf  (61440 ties up)
// The hardware instruction saturates to ±448 and ±57344 instead; adding one to the saturated byte gives just PyTorch's NaN or
// infinity. `Saturated` says that the value is already inside the finite range and leaves that out.
#pragma once

#include <cuda_fp8.h>

#include "vec.cuh"

namespace inductor_ext {

template <typename Fp8>
struct Fp8Traits;
template <>
struct Fp8Traits<__nv_fp8_e4m3> {
  __device__ static __forceinline__ uint32_t pair(float low, float high) {
    uint16_t bytes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    return bytes;
  }
  __device__ static __forceinline__ bool overflows(float v) { return fabsf(v) > 464.0f; }
};
template <>
struct Fp8Traits<__nv_fp8_e5m2> {
  __device__ static __forceinline__ uint32_t pair(float low, float high) {
    uint16_t bytes;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    return bytes;
  }
  __device__ static __forceinline__ bool overflows(float v) { return fabsf(v) >= 61440.0f; }
};

template <typename Fp8, bool Saturated>
__device__ __forceinline__ uint32_t cast_pair(float low, float high) {
  using Traits = Fp8Traits<Fp8>;
  uint32_t bytes = Traits::pair(low, high);
  if constexpr (!Saturated) {
    bytes += (Traits::overflows(low) ? 0x1u : 0u) + (Traits::overflows(high) ? 0x100u : 0u);
  }
  return bytes;
}

template <typename Fp8, bool Saturated, int N>
__device__ __forceinline__ Bytes<N> cast_fp8(const float (&v)[N]) {
  Bytes<N> result;
  if constexpr (N == 1) {
    result.byte = static_cast<uint8_t>(cast_pair<Fp8, Saturated>(v[0], 0.0f));
  } else {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      result.words[i] = cast_pair<Fp8, Saturated>(v[4 * i], v[4 * i + 1]) | cast_pair<Fp8, Saturated>(v[4 * i + 2], v[4 * i + 3]) << 16;
    }
  }
  return result;
}

// One vector through a chain of steps (steps.cuh) to FP8 in memory.
template <typename In, typename Fp8, bool Saturated, typename Chain, int N>
__device__ __forceinline__ void downcast_vector(const Raw<In, N>& raw, const typename Chain::Prepared& prepared, uint8_t* out) {
  float v[N];
  raw.unpack(v);
  Chain::apply(prepared, v);
  cast_fp8<Fp8, Saturated>(v).store(out);
}

}  // namespace inductor_ext
