// The steps that only scales are made of (steps.cuh has the rest, kernels/steps.py the language), and operands that take steps.
//
//   Add<T, O>          v + o                              PositiveOr<T, O>   v > 0 ? v : o, so NaN becomes o
//   Abs<T>             |v|                                NonzeroOr<T, O>    v == 0 ? o : v, so NaN stays NaN
//   Log2 Exp2 Ceil Floor <float>   CUDA's functions of these names, which eager PyTorch calls too
//   Pow2<float>        2^v of an integral v
//   BitsUp<float>      the next power of two: exponent + (mantissa != 0), shifted back without the sign
//   Ue8m0<float>       the same, the exponent clamped to 1 … 254
//   Wide<S...>         to double, the steps of namespace `wide` there, and rounded to float
//
//   Through<O, Program>   operand O after the steps of Program: once a thread or a row, not once a value
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace inductor_ext {

namespace scale_step {

struct Abs {
  __device__ static __forceinline__ float of(float v) { return fabsf(v); }
};
struct Log2 {
  __device__ static __forceinline__ float of(float v) { return log2f(v); }
};
struct Exp2 {
  __device__ static __forceinline__ float of(float v) { return exp2f(v); }
};
struct Ceil {
  __device__ static __forceinline__ float of(float v) { return ceilf(v); }
};
struct Floor {
  __device__ static __forceinline__ float of(float v) { return floorf(v); }
};

__device__ __forceinline__ int32_t exponent_up(uint32_t bits) { return static_cast<int32_t>((bits >> 23 & 0xff) + ((bits & 0x7fffff) != 0)); }

struct BitsUp {  // exponent 256, of a NaN, becomes the sign bit: -0.0, as the shift of an int32 gives it
  __device__ static __forceinline__ float of(float v) { return __uint_as_float(static_cast<uint32_t>(exponent_up(__float_as_uint(v))) << 23); }
};
struct Ue8m0 {
  __device__ static __forceinline__ float of(float v) {
    const int32_t exponent = exponent_up(__float_as_uint(v));
    return __uint_as_float(static_cast<uint32_t>(exponent < 1 ? 1 : exponent > 254 ? 254 : exponent) << 23);
  }
};

}  // namespace scale_step

// A function of one value. In 16 bits it is computed in fp32 and rounded, which nothing but |v| is asked for.
template <typename T, typename F>
struct Each {
  static_assert(std::is_same_v<T, float> || std::is_same_v<F, scale_step::Abs>, "a step of fp32 alone");
  static constexpr bool kRow = false;
  struct Prepared {};
  template <typename Env>
  __device__ static __forceinline__ Prepared prepare(const Env&) { return {}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared&, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = F::of(v[i]);
  }
};
template <typename T>
using Abs = Each<T, scale_step::Abs>;
template <typename T>
using Log2 = Each<T, scale_step::Log2>;
template <typename T>
using Exp2 = Each<T, scale_step::Exp2>;
template <typename T>
using Pow2 = Each<T, scale_step::Exp2>;
template <typename T>
using Ceil = Each<T, scale_step::Ceil>;
template <typename T>
using Floor = Each<T, scale_step::Floor>;
template <typename T>
using BitsUp = Each<T, scale_step::BitsUp>;
template <typename T>
using Ue8m0 = Each<T, scale_step::Ue8m0>;

template <typename T, typename Operand>
struct Add {
  static constexpr bool kRow = Operand::kRow;
  struct Prepared {
    float addend;
  };
  template <typename Env>
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {fetch<T, Operand>(env)}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __fadd_rn(v[i], p.addend);
    round_to<T>(v);
  }
};

template <typename T, typename Operand, bool Positive>
struct Or {
  static constexpr bool kRow = Operand::kRow;
  struct Prepared {
    float other;
  };
  template <typename Env>
  __device__ static __forceinline__ Prepared prepare(const Env& env) { return {round_to<T>(Operand::get(env))}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared& p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool keep = Positive ? v[i] > 0.0f : v[i] != 0.0f;
      v[i] = keep ? v[i] : p.other;
    }
  }
};
template <typename T, typename Operand>
using PositiveOr = Or<T, Operand, true>;
template <typename T, typename Operand>
using NonzeroOr = Or<T, Operand, false>;

// ---- double -----------------------------------------------------------------------------------------------------------------
// A number is in the type, as its 64 bits: a call's constants are fp32.

namespace wide {

template <uint64_t Bits>
__device__ __forceinline__ double number() { return __longlong_as_double(static_cast<long long>(Bits)); }

template <uint64_t Bits>
struct Mul {
  __device__ static __forceinline__ double of(double v) { return __dmul_rn(v, number<Bits>()); }
};
template <uint64_t Bits>
struct Div {  // eager PyTorch on a GPU multiplies by the inverse of a Python number, in double too
  __device__ static __forceinline__ double of(double v) { return __dmul_rn(v, __drcp_rn(number<Bits>())); }
};
template <uint64_t Bits>
struct Add {
  __device__ static __forceinline__ double of(double v) { return __dadd_rn(v, number<Bits>()); }
};
template <uint64_t Bits>
struct Max {  // NaN stays NaN
  __device__ static __forceinline__ double of(double v) { return v < number<Bits>() ? number<Bits>() : v; }
};
template <uint64_t Bits>
struct Min {
  __device__ static __forceinline__ double of(double v) { return v > number<Bits>() ? number<Bits>() : v; }
};
struct Recip {
  __device__ static __forceinline__ double of(double v) { return __drcp_rn(v); }
};

}  // namespace wide

template <typename... S>
struct Wide {
  static constexpr bool kRow = false;
  struct Prepared {};
  template <typename Env>
  __device__ static __forceinline__ Prepared prepare(const Env&) { return {}; }
  template <int N>
  __device__ static __forceinline__ void apply(const Prepared&, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      double value = v[i];
      ((value = S::of(value)), ...);
      v[i] = __double2float_rn(value);
    }
  }
};

// ---- operands ---------------------------------------------------------------------------------------------------------------

template <typename Operand, typename Program>
struct Through {
  static constexpr bool kTensor = true, kRow = Operand::kRow;
  template <typename Env>
  __device__ static __forceinline__ float get(const Env& env) {
    float value[1] = {Operand::get(env)};
    Program::apply(Program::prepare(env), value);
    return value[0];
  }
};

}  // namespace inductor_ext
