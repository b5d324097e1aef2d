// Activations, and the forms in which models use them, in place of gate:
//
//   Gated<Act>         round(round(act(gate)) * up)
//   GatedInFp32<Act>   round(act(gate) * up)
//   Alone<Act>         round(act(gate))
//   ClampedSwiglu      gpt-oss's: gate at most 7, up within 7, and gate * sigmoid(1.702 gate) times up + 1, each step rounded
//
// The activations are PyTorch's own formulas (aten/src/ATen/native/cuda/Activation*.cu), computed in fp32. QuickGelu and
// ReluSquared are several operators in a graph, each of which rounds.
#pragma once

#include <type_traits>

#include "inductor_ext/steps.cuh"
#include "inductor_ext/vec.cuh"

namespace inductor_ext {

// 1 / divisor and x / divisor by the instructions of CUDA's own divisions, without their check of every value's range and the call
// behind it: divisor within [1, 2^116], |x| at most 2^100, and no remainder that underflows (where |x| is that small, 1 + exp(-x)
// is 2). -0 stays -0.
__device__ __forceinline__ float inverse_in_range(float divisor) {
  const float inverse = estimate_of_inverse(divisor);
  return __fmaf_rn(__fmaf_rn(-divisor, inverse, 1.0f), inverse, inverse);
}
__device__ __forceinline__ float divide_in_range(float x, float divisor) {
  const float inverse = inverse_in_range(divisor), quotient = __fmul_rn(x, inverse);
  return __fmaf_rn(-__fmaf_rn(divisor, quotient, -x), inverse, quotient);
}
constexpr float kExpInRange = 80.0f;  // 1 + exp(80) is below 2^116

struct Silu {
  // x / (1 + exp(-x)). For bf16 in six instructions, a quarter of both so that 1 / (1 + exp(88)) is no subnormal, which the estimate
  // would flush: PyTorch's bytes for each of the 65 536 values. For fp16, two of whose values that gets wrong, the exponential is
  // exact and the quotient corrected by its remainder. (Tried: test_silu_of_every_16_bit_value.) For fp32, whose values nobody can
  // try, it is the division itself, and so for fp16 where the divisor or x is out of range.
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&x)[N]) {
    if constexpr (std::is_same_v<In, __nv_bfloat16>) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float quarter = __fmul_rn(x[i], 0.25f);
        float power, inverse;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(quarter, -4.0f * kLog2E)));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fmaf_rn(power, 0.25f, 0.25f)));
        x[i] = __fmul_rn(quarter, inverse);
      }
    } else {
      float divisor[N], most = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) divisor[i] = 1.0f + expf(-x[i]), most = fmaxf(most, fabsf(x[i]));
      if (most > kExpInRange) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = x[i] / divisor[i];
      } else if constexpr (std::is_same_v<In, float>) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = divide_in_range(x[i], divisor[i]);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float inverse;
          asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor[i]));
          const float quotient = __fmul_rn(x[i], inverse);
          x[i] = __fmaf_rn(-__fmaf_rn(divisor[i], quotient, -x[i]), inverse, quotient);  // -0 stays -0
        }
      }
    }
  }

 private:
  static constexpr float kLog2E = 1.44269504088896340736f;
};
struct Gelu {
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] * 0.5f * (1.0f + erff(x[i] * 0.70710678118654752440f));
  }
};
struct GeluTanh {
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&x)[N]) {
    constexpr float kBeta = 0.79788456080286535588f, kKappa = 0.044715f;  // sqrt(2 / pi)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float cube = x[i] * x[i] * x[i];
      x[i] = 0.5f * x[i] * (1.0f + tanhf(kBeta * (x[i] + kKappa * cube)));
    }
  }
};

// x * sigmoid(1.702 x), each step rounded to In but the last.
template <typename In, int N>
__device__ __forceinline__ void quick_gelu(float (&x)[N]) {
  float v[N], most = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = __fmul_rn(x[i], 1.702f);
  round_to<In>(v);
#pragma unroll
  for (int i = 0; i < N; ++i) most = fmaxf(most, -v[i]), v[i] = 1.0f + expf(-v[i]);
  if (most > kExpInRange) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = 1.0f / v[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = inverse_in_range(v[i]);
  }
  round_to<In>(v);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], v[i]);
}
struct QuickGelu {
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&x)[N]) { quick_gelu<In>(x); }
};
struct ReluSquared {
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float positive = x[i] < 0.0f ? 0.0f : x[i];  // NaN stays
      x[i] = __fmul_rn(positive, positive);
    }
  }
};

template <typename Act>
struct Gated {
  template <typename In, int E>
  __device__ static __forceinline__ void apply(Raw<In, E>& y, const Raw<In, E>& up) {
    float v[E];
    y.unpack(v);
    Act::template apply<In>(v);
    y.pack(v);
    y.multiply(up);
  }
};
template <typename Act>
struct GatedInFp32 {
  template <typename In, int E>
  __device__ static __forceinline__ void apply(Raw<In, E>& y, const Raw<In, E>& up) {
    float v[E], factor[E];
    y.unpack(v), up.unpack(factor);
    Act::template apply<float>(v);
#pragma unroll
    for (int i = 0; i < E; ++i) v[i] = __fmul_rn(v[i], factor[i]);
    y.pack(v);
  }
};
template <typename Act>
struct Alone {
  template <typename In, int E>
  __device__ static __forceinline__ void apply(Raw<In, E>& y, const Raw<In, E>&) {
    float v[E];
    y.unpack(v);
    Act::template apply<In>(v);
    y.pack(v);
  }
};
struct ClampedSwiglu {
  template <typename In, int E>
  __device__ static __forceinline__ void apply(Raw<In, E>& y, const Raw<In, E>& up) {
    constexpr float kLimit = 7.0f;
    float v[E], factor[E];
    y.unpack(v), up.unpack(factor);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      v[i] = v[i] > kLimit ? kLimit : v[i];  // NaN stays
      const float above = factor[i] < -kLimit ? -kLimit : factor[i];
      factor[i] = __fadd_rn(above > kLimit ? kLimit : above, 1.0f);
    }
    quick_gelu<In>(v);
    round_to<In>(v), round_to<In>(factor);
#pragma unroll
    for (int i = 0; i < E; ++i) v[i] = __fmul_rn(factor[i], v[i]);
    y.pack(v);
  }
};

}  // namespace inductor_ext
