// What a model does with a normalised value and the weight of an RMSNorm; In is the dtype of both ends, to which the caller
// rounds afterwards.
//
//   CastThenWeight           round(v) * w       Llama, Mistral, Qwen, Phi
//   WeightThenCast           v * w              torch.nn.functional.rms_norm, OLMo 2
//   OnePlusWeightThenCast    v * (1 + w)        Gemma
//   NoNorm                   no norm at all
//   NormSteps<…>             any others, one step after the other: the language of kernels/norms.py
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

// What steps multiply by and add: a column's weight and bias, and its factor and shift of this row's sample.
enum NormOperand { kWeight, kBias, kFactor, kShift };
template <int N>
struct NormOperands {
  float of[4][N];
};

// What is made of an operand, of dtype T, before it multiplies.
struct AsItIs {
  template <typename T>
  __device__ static __forceinline__ float made(float v) { return v; }
};
struct OnePlus {
  template <typename T>
  __device__ static __forceinline__ float made(float v) { return __fadd_rn(1.0f, v); }
};
struct OnePlusRounded {
  template <typename T>
  __device__ static __forceinline__ float made(float v) { return round_to<T>(__fadd_rn(1.0f, v)); }
};

// Row has In, the dtype of both ends, W of weight and bias, M of factor and shift.
struct NormCast {
  static constexpr bool reads(NormOperand) { return false; }
  template <typename Row, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const NormOperands<N>&) { round_to<typename Row::In>(v); }
};
template <NormOperand kOf, typename Made = AsItIs>
struct Times {
  static constexpr bool reads(NormOperand of) { return of == kOf; }
  template <typename Row, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const NormOperands<N>& operands) {
    using T = std::conditional_t<(kOf < kFactor), typename Row::W, typename Row::M>;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], Made::template made<T>(operands.of[kOf][i]));
  }
};
template <NormOperand kOf>
struct Plus {
  static constexpr bool reads(NormOperand of) { return of == kOf; }
  template <typename Row, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const NormOperands<N>& operands) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fadd_rn(v[i], operands.of[kOf][i]);
  }
};
template <typename... Steps>
struct NormSteps {
  static constexpr bool reads(NormOperand of) { return (Steps::reads(of) || ...); }
  template <typename Row, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const NormOperands<N>& operands) {
    (Steps::template apply<Row>(v, operands), ...);
  }
};

// Whether a norm reads an operand, and the norm itself: NormSteps, or one of the three above.
template <typename Norm>
struct AnyNorm {
  static constexpr bool reads(NormOperand of) { return of == kWeight; }
  template <typename Row, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const NormOperands<N>& operands) {
    Norm::template apply<typename Row::In>(v, operands.of[kWeight]);
  }
};
template <typename... Steps>
struct AnyNorm<NormSteps<Steps...>> : NormSteps<Steps...> {};

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
