// Gated activations: y = round(round(act(gate)) * up), in place of gate.
//
// The activations are PyTorch's own formulas (aten/src/ATen/native/cuda/Activation*.cu), computed in fp32.
#pragma once

#include <type_traits>

#include "inductor_ext/vec.cuh"

namespace inductor_ext {

struct Silu {
  // x / (1 + exp(-x)). The quotient is estimated and corrected by its remainder, four instructions for the division's ten: the
  // correctly rounded one for every bf16 and fp16 x (tried: test_silu_of_every_16_bit_value). Where the divisor or x is out of
  // the estimate's range, and for fp32, whose values nobody can try, it is the division itself.
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&x)[N]) {
    float divisor[N], most = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) divisor[i] = 1.0f + expf(-x[i]), most = fmaxf(most, fabsf(x[i]));
    if (std::is_same_v<In, float> || most > 80.0f) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] / divisor[i];
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

// y = act(y) * factor, each step rounded.
template <typename In, typename Act, int E, int U>
__device__ __forceinline__ void act_mul(Raw<In, E> (&y)[U], const Raw<In, E> (&factor)[U]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float v[E];
    y[u].unpack(v);
    Act::template apply<In>(v);
    y[u].pack(v);
    y[u].multiply(factor[u]);
  }
}

}  // namespace inductor_ext
