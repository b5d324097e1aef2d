// v / d for many v and one d, where the quotient is only clamped and cast to FP8 (or first rounded to 16 bits) afterwards:
// two instructions a value and no range check, with the bits that a correctly rounded division would lead to.
//
// 1/d is kept as high + low, high being 1/d rounded toward zero: v/d ~ fma(v, high, v * low), one rounding of a value that is
// within about 2^-23 ulp of v/d. So it differs from the rounded quotient, by one ulp, only where v/d all but touches the middle
// of two floats, and the result differs only where one of those two floats is itself a boundary of the later rounding. For FP8
// (boundaries of at most 5 significant bits) there is no such v and d of 24 bits, for bf16 and fp16 no such v and d of that
// dtype: shown by trying all of them, `benchmarks/kernels/downcast.py --check`, "near division".
//   low has the sign of high and is never zero: zeros keep their sign, and inf * low is no NaN.
//   d = 0, inf, NaN: high = low = 1/d gives inf or NaN, 0 or NaN, NaN as the division does.
//   |d| outside [2^-60, 2^60]: v and d are multiplied by 2^64 or 2^-64 first, so that 1/d is far from overflow and underflow.
//   |v/d| < 2^-79 may lose bits but not its sign, and |v/d| > 2^60 may come out as infinity: neither shows in FP8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

__device__ __forceinline__ float estimate_of_inverse(float v) {  // within one ulp; subnormals are zeros
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

struct NearDivisor {
  float high, low;  // 1 / (d * factor)
  float factor;

  __device__ static __forceinline__ NearDivisor of(float d) {
    const float factor = fabsf(d) < 0x1p-60f ? 0x1p64f : fabsf(d) > 0x1p60f ? 0x1p-64f : 1.0f;
    d = __fmul_rn(d, factor);
    const float approximate = estimate_of_inverse(d);
    float remainder = __fmaf_rn(-d, approximate, 1.0f);
    if (remainder != remainder) return {approximate, approximate, factor};  // d is 0, inf or NaN
    const float nearest = __fmaf_rn(remainder, approximate, approximate);
    remainder = __fmaf_rn(-d, nearest, 1.0f);
    const float high = remainder < 0.0f ? __uint_as_float(__float_as_uint(nearest) - 1) : nearest;
    remainder = __fmaf_rn(-d, high, 1.0f);
    float low = __fmul_rn(remainder, nearest);
    low = __fmaf_rn(__fmaf_rn(-d, low, remainder), nearest, low);
    // The one significand for which the best `low` is not good enough: 7.499999 / 1.4999999 would come out as 5.
    if ((__float_as_uint(d) & 0x7fffffu) == 0x3fffffu) low = __uint_as_float(__float_as_uint(low) - 1);
    return {high, low == 0.0f ? __fmul_rn(high, 0x1p-60f) : low, factor};
  }
  template <int N>
  __device__ __forceinline__ void divide(float (&v)[N]) const {
    if (factor != 1.0f) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], factor);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmaf_rn(v[i], high, __fmul_rn(v[i], low));
  }
};

}  // namespace inductor_ext
