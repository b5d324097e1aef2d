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

template <typename T>
constexpr uint32_t kPackedOnes = std::is_same_v<T, __nv_bfloat16> ? 0x3f803f80u : std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f800000u;

// What is made of an operand, of dtype T, before it multiplies. Where it is of dtype T again: on packed values too.
struct AsItIs {
  static constexpr bool kPacks = true;
  template <typename T>
  __device__ static __forceinline__ float made(float v) { return v; }
  template <typename T, int N>
  __device__ static __forceinline__ Raw<T, N> made(const Raw<T, N>& raw) { return raw; }
};
struct OnePlus {
  static constexpr bool kPacks = false;
  template <typename T>
  __device__ static __forceinline__ float made(float v) { return __fadd_rn(1.0f, v); }
};
struct OnePlusRounded {
  static constexpr bool kPacks = true;
  template <typename T>
  __device__ static __forceinline__ float made(float v) { return round_to<T>(__fadd_rn(1.0f, v)); }
  template <typename T, int N>
  __device__ static __forceinline__ Raw<T, N> made(const Raw<T, N>& raw) {
    Raw<T, N> ones;
#pragma unroll
    for (int i = 0; i < Raw<T, N>::kWords; ++i) ones.words[i] = kPackedOnes<T>;
    ones.add(raw);
    return ones;
  }
};

// Row has In, the dtype of both ends, W of weight and bias, M of factor and shift. `given.raw<kOf>()` is a vector of an operand.
// A step whose value and operand are of dtype In, and that is rounded at once, can be done on packed values: kPacks.
template <typename Row, NormOperand kOf>
using OperandType = std::conditional_t<(kOf < kFactor), typename Row::W, typename Row::M>;

struct NormCast {
  static constexpr bool reads(NormOperand) { return false; }
};
template <NormOperand kOf, typename Made = AsItIs>
struct Times {
  template <typename Row>
  static constexpr bool kPacks = Made::kPacks && std::is_same_v<OperandType<Row, kOf>, typename Row::In>;
  static constexpr bool reads(NormOperand of) { return of == kOf; }
  template <typename Row, typename Given, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const Given& given) {
    float factor[N];
    given.template raw<kOf>().unpack(factor);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], Made::template made<OperandType<Row, kOf>>(factor[i]));
  }
  template <typename Given, typename Packed>
  __device__ static __forceinline__ void apply_packed(Packed& y, const Given& given) { y.multiply(Made::made(given.template raw<kOf>())); }
};
template <NormOperand kOf>
struct Plus {
  template <typename Row>
  static constexpr bool kPacks = std::is_same_v<OperandType<Row, kOf>, typename Row::In>;
  static constexpr bool reads(NormOperand of) { return of == kOf; }
  template <typename Row, typename Given, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const Given& given) {
    float addend[N];
    given.template raw<kOf>().unpack(addend);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fadd_rn(v[i], addend[i]);
  }
  template <typename Given, typename Packed>
  __device__ static __forceinline__ void apply_packed(Packed& y, const Given& given) { y.add(given.template raw<kOf>()); }
};

template <typename... Rest>
constexpr bool kRoundsNext = true;
template <typename Step, typename... Rest>
constexpr bool kRoundsNext<Step, Rest...> = std::is_same_v<Step, NormCast>;

// A value is in fp32 until a cast packs it; packed, a step takes it back to fp32 only where it must.
template <typename... Steps>
struct NormSteps {
  static constexpr bool reads(NormOperand of) { return (Steps::reads(of) || ...); }
  // y = the steps of v, rounded to In.
  template <typename Row, typename Given, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const Given& given, Raw<typename Row::In, N>& y) {
    in_fp32<Row, Given, N, Steps...>(v, given, y);
  }

 private:
  template <typename Row, typename Given, int N>
  __device__ static __forceinline__ void in_fp32(float (&v)[N], const Given&, Raw<typename Row::In, N>& y) { y.pack(v); }
  template <typename Row, typename Given, int N, typename Step, typename... Rest>
  __device__ static __forceinline__ void in_fp32(float (&v)[N], const Given& given, Raw<typename Row::In, N>& y) {
    if constexpr (std::is_same_v<Step, NormCast>) {
      y.pack(v);
      packed<Row, Given, N, Rest...>(given, y);
    } else {
      Step::template apply<Row>(v, given);
      in_fp32<Row, Given, N, Rest...>(v, given, y);
    }
  }
  template <typename Row, typename Given, int N>
  __device__ static __forceinline__ void packed(const Given&, Raw<typename Row::In, N>&) {}
  template <typename Row, typename Given, int N, typename Step, typename... Rest>
  __device__ static __forceinline__ void packed(const Given& given, Raw<typename Row::In, N>& y) {
    if constexpr (std::is_same_v<Step, NormCast>) {
      packed<Row, Given, N, Rest...>(given, y);
    } else if constexpr (Step::template kPacks<Row> && kRoundsNext<Rest...>) {
      Step::apply_packed(y, given);
      packed<Row, Given, N, Rest...>(given, y);
    } else {
      float v[N];
      y.unpack(v);
      in_fp32<Row, Given, N, Step, Rest...>(v, given, y);
    }
  }
};

// Whether a norm reads an operand, and the norm itself: NormSteps, or one of the three above.
template <typename Norm>
struct AnyNorm {
  static constexpr bool reads(NormOperand of) { return of == kWeight; }
  template <typename Row, typename Given, int N>
  __device__ static __forceinline__ void apply(float (&v)[N], const Given& given, Raw<typename Row::In, N>& y) {
    if constexpr (std::is_same_v<Norm, CastThenWeight> && std::is_same_v<typename Row::W, typename Row::In>) {  // two products at once
      y.pack(v);
      y.multiply(given.template raw<kWeight>());
    } else {
      float weight[N];
      given.template raw<kWeight>().unpack(weight);
      Norm::template apply<typename Row::In>(v, weight);
      y.pack(v);
    }
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
