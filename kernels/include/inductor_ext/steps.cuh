// An element-wise chain as a type: Steps<To<float>, Div<float, Scalar<0, float>>, Max<float, Const<0>>, Min<float, Const<1>>>.
//
// The value is an fp32 register whose dtype the code generator tracks; every step is told the dtype T of its result and rounds
// to it, so that the bits are those of PyTorch's eager operators on CUDA: computed in fp32, then rounded.
//
//   To<T>            round to T                        Max<T, O>   clamp_min, NaN in either stays NaN
//   Mul<T, O>        v * o                             Min<T, O>   clamp_max, likewise
//   Div<T, O>        v / o, correctly rounded; by a constant: v * (1.0f / c), as eager divides by a Python number
//   Recip<T>         1 / v
//
//   Const<I>         number I of the call, an fp32 value that is never rounded to T
//   Scalar<I, S>     operand tensor I: one element of dtype S
//   Row<I, S>        operand tensor I: one element a row
//   Scale, OfAmax    the dynamic scale of fp8_quantize, and the maximum that it is made of
//   Through<O, S>    operand O after steps of its own: scale_steps.cuh, which has more steps too
// Tensor operands are rounded to T before use, as TensorIterator casts a 0-d CUDA tensor to the common dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "divide.cuh"

namespace inductor_ext {

constexpr int kMaxConsts = 8;
constexpr int kMaxOperands = 4;

struct Consts {  // by value among the kernel's parameters
  float value[kMaxConsts];
  float inverse[kMaxConsts];  // 1.0f / value
  const void* bound;          // tensor operand 0 of the programs of a dynamic scale, one element; or null

  static Consts of(const double (&c)[kMaxConsts], const void* bound = nullptr) {
    Consts consts;
    consts.bound = bound;
    for (int i = 0; i < kMaxConsts; ++i) {
      consts.value[i] = static_cast<float>(c[i]);
      consts.inverse[i] = 1.0f / consts.value[i];
    }
    return consts;
  }
};

struct Operands {
  const void* pointer[kMaxOperands];
};

struct Env {  // what the operands of a program are read from
  const Consts& consts;
  const void* const* operands;  // may be null where the program has none
  int64_t row = 0;
  float scale = 0.0f, amax = 0.0f;
};

// ---- rounding ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(double v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

template <typename T>
__device__ __forceinline__ float round_to(float v) {
  return to_float(from_float<T>(v));
}

template <typename T, int N>
__device__ __forceinline__ void round_to(float (&v)[N]) {
  if constexpr (std::is_same_v<T, float>) {
  } else if constexpr (N == 1) {
    v[0] = round_to<T>(v[0]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      uint32_t pair;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v[i + 1]), "f"(v[i]));
      v[i] = __uint_as_float(pair << 16);
      v[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      float2 pair = __half22float2(__floats2half2_rn(v[i], v[i + 1]));
      v[i] = pair.x, v[i + 1] = pair.y;
    }
  }
}

// ---- operands ---------------------------------------------------------------------------------------------------------------

template <int I>
struct Const {
  static constexpr bool kTensor = false, kRow = false;
  __device__ static __forceinline__ float get(const Env& env) { return env.consts.value[I]; }
  __device__ static __forceinline__ float inverse(const Env& env) { return env.consts.inverse[I]; }
};
template <int I, typename S>
struct Scalar {
  static constexpr bool kTensor = true, kRow = false;
  __device__ static __forceinline__ float get(const Env& env) {
    return to_float(*static_cast<const S*>(env.operands[I]));
  }
};
template <int I, typename S>
struct Row {
  static constexpr bool kTensor = true, kRow = true;
  __device__ static __forceinline__ float get(const Env& env) {
    return to_float(static_cast<const S*>(env.operands[I])[env.row]);
  }
};
struct Scale {
  static constexpr bool kTensor = true, kRow = false;
  __device__ static __forceinline__ float get(const Env& env) { return env.scale; }
};
struct OfAmax {
  static constexpr bool kTensor = true, kRow = false;
  __device__ static __forceinline__ float get(const Env& env) { return env.amax; }
};

template <typename T, typename Operand>
__device__ __forceinline__ float fetch(const Env& env) {
  float value = Operand::get(env);
  return Operand::kTensor ? round_to<T>(value) : value;
}

// ---- steps ------------------------------------------------------------------------------------------------------------------
// `Prepared` is what a step keeps in registers for many values; `prepare` reads it once a thread, or once a row.

struct Nothing {};

template <typename T>
struct To {
  static constexpr bool kRow = false;
  using Prepared = Nothing;
  __device__ static __forceinline__ Prepared prepare(const Env&) { return {}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared&, float (&v)[N]) {
    round_to<T>(v);
  }
};

template <typename T>
struct Recip {
  static constexpr bool kRow = false;
  using Prepared = Nothing;
  __device__ static __forceinline__ Prepared prepare(const Env&) { return {}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared&, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __frcp_rn(v[i]);
    round_to<T>(v);
  }
};

template <typename T, typename Operand>
struct Mul {
  static constexpr bool kRow = Operand::kRow;
  struct Prepared {
    float factor;
  };
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {fetch<T, Operand>(env)}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], p.factor);
    round_to<T>(v);
  }
};

template <typename T, typename Operand>
struct Div {
  static constexpr bool kRow = Operand::kRow;
  struct Prepared {
    float divisor;
  };
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {fetch<T, Operand>(env)}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fdiv_rn(v[i], p.divisor);
    round_to<T>(v);
  }
};

// Div in a chain that leads to FP8 by clamps alone: see divide.cuh. `ToFp8` puts it in.
template <typename T, typename Operand>
struct NearDiv {
  static constexpr bool kRow = Operand::kRow;
  using Prepared = NearDivisor;
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return NearDivisor::of(fetch<T, Operand>(env)); }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
    p.divide(v);
    round_to<T>(v);
  }
};

template <typename T, int I>
struct Div<T, Const<I>> {
  static constexpr bool kRow = false;
  struct Prepared {
    float inverse;
  };
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {Const<I>::inverse(env)}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fmul_rn(v[i], p.inverse);
    round_to<T>(v);
  }
};

// The value already is of dtype T and rounding is monotone: rounding the bound once gives what rounding every result would.
template <typename T, typename Operand>
struct Max {
  static constexpr bool kRow = Operand::kRow;
  struct Prepared {
    float bound;
  };
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {round_to<T>(Operand::get(env))}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = max_nan(v[i], p.bound);
  }
};
template <typename T, typename Operand>
struct Min {
  static constexpr bool kRow = Operand::kRow;
  struct Prepared {
    float bound;
  };
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {round_to<T>(Operand::get(env))}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = min_nan(v[i], p.bound);
  }
};

}  // namespace inductor_ext

#include "scale_steps.cuh"

namespace inductor_ext {

template <typename... S>
struct Steps;

template <>
struct Steps<> {
  static constexpr bool kRow = false;
  using Prepared = Nothing;
  __device__ static __forceinline__ Prepared prepare(const Env&) { return {}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared&, float (&)[N]) {}
};

template <typename Head, typename... Tail>
struct Steps<Head, Tail...> {
  static constexpr bool kRow = Head::kRow || (Tail::kRow || ...);  // some operand has a value a row
  struct Prepared {
    typename Head::Prepared head;
    typename Steps<Tail...>::Prepared tail;
  };
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {Head::prepare(env), Steps<Tail...>::prepare(env)}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
    Head::apply(p.head, v);
    Steps<Tail...>::apply(p.tail, v);
  }
};

// ---- chains that end in FP8 -------------------------------------------------------------------------------------------------

// Whether a step may stand between a NearDiv<T, ...> and the cast to FP8. An fp32 quotient must not be rounded on the way.
template <typename T, typename Step>
constexpr bool kKeepsNear = false;
template <typename T, typename U>
constexpr bool kKeepsNear<T, To<U>> = !std::is_same_v<T, float> || std::is_same_v<U, float>;
template <typename T, typename U, typename Operand>
constexpr bool kKeepsNear<T, Max<U, Operand>> = true;
template <typename T, typename U, typename Operand>
constexpr bool kKeepsNear<T, Min<U, Operand>> = true;

template <typename Step, typename... Tail>
struct Nearer {
  using Type = Step;
};
template <typename T, typename Operand, typename... Tail>
struct Nearer<Div<T, Operand>, Tail...> {
  using Type = std::conditional_t<Operand::kTensor && (kKeepsNear<T, Tail> && ...), NearDiv<T, Operand>, Div<T, Operand>>;
};

template <typename Done, typename... S>
struct ToFp8Steps;
template <typename... Done>
struct ToFp8Steps<Steps<Done...>> {
  using Type = Steps<Done...>;
};
template <typename... Done, typename Head, typename... Tail>
struct ToFp8Steps<Steps<Done...>, Head, Tail...> {
  using Type = typename ToFp8Steps<Steps<Done..., typename Nearer<Head, Tail...>::Type>, Tail...>::Type;
};
template <typename Program>
struct ToFp8Of;
template <typename... S>
struct ToFp8Of<Steps<S...>> {
  using Type = typename ToFp8Steps<Steps<>, S...>::Type;
};

// The program with cheaper steps where the cast to FP8 behind it makes them equal.
template <typename Program>
using ToFp8 = typename ToFp8Of<Program>::Type;

// Calls visit(index, is_row, S{}) for every tensor operand of the program: the host checks that each was given.
template <typename Step>
struct VisitStep {
  template <typename F>
  static void with(F&&) {}
};
template <template <typename, typename> class Step, typename T, int I, typename S>
struct VisitStep<Step<T, Scalar<I, S>>> {
  template <typename F>
  static void with(F&& visit) { visit(I, false, S{}); }
};
template <template <typename, typename> class Step, typename T, int I, typename S>
struct VisitStep<Step<T, Row<I, S>>> {
  template <typename F>
  static void with(F&& visit) { visit(I, true, S{}); }
};
template <typename Program>
struct VisitOperands {  // of what is none of Steps, such as MxScale: nothing
  template <typename F>
  static void with(F&&) {}
};
template <template <typename, typename> class Step, typename T, typename Operand, typename Program>
struct VisitStep<Step<T, Through<Operand, Program>>> {
  template <typename F>
  static void with(F&& visit) { VisitStep<Step<T, Operand>>::with(visit), VisitOperands<Program>::with(visit); }
};
template <typename... S>
struct VisitOperands<Steps<S...>> {
  template <typename F>
  static void with(F&& visit) { (VisitStep<S>::with(visit), ...); }
};

}  // namespace inductor_ext
