// Correctly rounded v / d for many v and one d: the bits of __fdiv_rn, without its reciprocal and range check per element.
//
// With r = RN(1/d): q0 = v*r is within 1.5 ulp, q1 = q0 + (v - d*q0)*r is a faithful quotient, and then (Markstein's theorem)
// q1 + (v - d*q1)*r rounds correctly, since the remainder v - d*q1 of a faithful quotient is exact. All of it needs that nothing
// over- or underflows: |v| and |d| within [2^-60, 2^60] give quotients within [2^-120, 2^120] and remainders that are multiples
// of at least 2^-107. Zeros are exact too but lose their sign in the remainder, hence the middle road; anything else (subnormal,
// huge, inf, NaN) goes to __fdiv_rn. Checked against __fdiv_rn by benchmarks/kernels/downcast.py.
#pragma once

#include <cuda_runtime.h>

namespace inductor_ext {

__device__ __forceinline__ float max_nan(float a, float b) {  // NaN if either is
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

struct Divisor {
  static constexpr float kLow = 0x1p-60f;
  static constexpr float kHigh = 0x1p60f;
  float d, r;
  float limit;  // greatest |v| of the fast road; negative where d itself is out of range

  __device__ static __forceinline__ Divisor of(float d) {
    bool in_range = fabsf(d) >= kLow && fabsf(d) <= kHigh;
    return {d, __frcp_rn(d), in_range ? kHigh : -1.0f};
  }
  __device__ __forceinline__ float quotient(float v) const {
    float q = __fmul_rn(v, r);
    q = __fmaf_rn(__fmaf_rn(-d, q, v), r, q);
    return __fmaf_rn(__fmaf_rn(-d, q, v), r, q);
  }

  template <int N>
  __device__ __forceinline__ void divide(float (&v)[N]) const {
#ifdef INDUCTOR_EXT_PLAIN_DIVISION
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fdiv_rn(v[i], d);
#else
    float low = fabsf(v[0]), high = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < N; ++i) low = fminf(low, fabsf(v[i])), high = max_nan(high, fabsf(v[i]));
    if (low >= kLow && high <= limit) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = quotient(v[i]);
      return;
    }
    low = kLow;
#pragma unroll
    for (int i = 0; i < N; ++i) low = fminf(low, v[i] == 0.0f ? kLow : fabsf(v[i]));
    if (low >= kLow && high <= limit) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = v[i] == 0.0f ? __fmul_rn(v[i], r) : quotient(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = __fdiv_rn(v[i], d);
    }
#endif
  }
};

}  // namespace inductor_ext
