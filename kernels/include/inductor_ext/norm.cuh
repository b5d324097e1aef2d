// What a model does with a normalised value and the weight of an RMSNorm; In is the dtype of both ends, to which the caller
// rounds afterwards.
//
//   CastThenWeight           round(v) * w       Llama, Mistral, Qwen, Phi
//   WeightThenCast           v * w              torch.nn.functional.rms_norm, OLMo 2
//   OnePlusWeightThenCast    v * (1 + w)        Gemma
//   NoNorm                   no norm at all
#pragma once

#include <type_traits>

#include "inductor_ext/steps.cuh"
#include "inductor_ext/vec.cuh"

namespace inductor_ext {

struct CastThenWeight {
  static constexpr bool kNorm = true;
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const float (&w)[N]) {
    round_to<In>(v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], w[i]);
  }
};
struct WeightThenCast {
  static constexpr bool kNorm = true;
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const float (&w)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], w[i]);
  }
};
struct OnePlusWeightThenCast {
  static constexpr bool kNorm = true;
  template <typename In, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const float (&w)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], __fadd_rn(1.0f, w[i]));
  }
};
struct NoNorm {
  static constexpr bool kNorm = false;
};

// x = norm(x * factor, weight), rounded to In.
template <typename Norm, typename In, typename W, int N>
__device__ __forceinline__ void normalise(Raw<In, N>& x, float factor, const Raw<W, N>& weight) {
  float v[N];
  x.unpack(v);
#pragma unroll
  for (int e = 0; e < N; ++e) v[e] = __fmul_rn(v[e], factor);
  if constexpr (std::is_same_v<Norm, CastThenWeight> && std::is_same_v<W, In>) {
    x.pack(v);
    x.multiply(weight);
  } else {
    float w[N];
    weight.unpack(w);
    Norm::template apply<In>(v, w);
    x.pack(v);
  }
}

}  // namespace inductor_ext
