// Stand-in for the step language: its rounding, and what a program is given. Tests bring their own programs.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

template <typename T>
float round_to(float v) { return to_float(from_float<T>(v)); }
template <typename T, int N>
void round_to(float (&v)[N]) {
  for (int i = 0; i < N; ++i) v[i] = to_float(from_float<T>(v[i]));
}

inline float estimate_of_inverse(float v) { return std::nextafter(1.0f / v, 0.0f); }

constexpr int kMaxConsts = 8;
struct Consts {
  float value[kMaxConsts];
  const void* bound;
  static Consts of(const double (&c)[kMaxConsts], const void* bound = nullptr) {
    Consts consts;
    consts.bound = bound;
    std::copy(std::begin(c), std::end(c), consts.value);
    return consts;
  }
};
struct Env {
  const Consts& consts;
  const void* const* operands;
  int64_t row = 0;
  float scale = 0.0f, amax = 0.0f;
};
template <typename Program>
using ToFp8 = Program;
template <typename Program>
struct VisitOperands {
  template <typename F>
  static void with(F&& visit) { with<Program>(visit, 0); }

 private:
  template <typename P, typename F>
  static auto with(F& visit, int) -> decltype(P::visit(visit)) { return P::visit(visit); }
  template <typename P, typename F>
  static void with(F&, long) {}  // names no operand
};

}  // namespace inductor_ext
