// Stand-in for the step language: its rounding, and what a program is given. Tests bring their own programs.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

template <typename T, int N>
void round_to(float (&v)[N]) {
  for (float& each : v) each = widen(narrow<T>(each));
}

constexpr int kMaxConsts = 8;
struct Consts {
  float value[kMaxConsts];
  static Consts of(const double (&c)[kMaxConsts]) {
    Consts consts;
    std::copy(std::begin(c), std::end(c), consts.value);
    return consts;
  }
};
struct Env {
  const Consts& consts;
  const void* const* operands;
  float scale = 0.0f;
};
template <typename Program>
using ToFp8 = Program;

}  // namespace inductor_ext
