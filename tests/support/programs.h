// What tests give kernels in place of an activation and of a quantisation's program: both can be computed exactly.
#pragma once

#include <algorithm>
#include <cmath>

namespace inductor_ext {

struct PlusAbs {
  template <typename In, int N>
  static void apply(float (&x)[N]) {
    for (float& each : x) each = each + std::fabs(each);
  }
};

// x.float() / scale within ±448, as torchao has it.
struct ByScale {
  static constexpr bool kRow = false;
  struct Prepared {
    float scale;
  };
  template <typename Env>
  static Prepared prepare(const Env& env) { return {env.scale}; }
  template <int N>
  static void apply(const Prepared& p, float (&v)[N]) {
    for (float& each : v) {
      each /= p.scale;
      if (each == each) each = std::min(std::max(each, -448.0f), 448.0f);
    }
  }
};

}  // namespace inductor_ext
