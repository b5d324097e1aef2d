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

struct Nothing {};
// scale = amax / 448 in fp32; rows of zeros have the scale 1.
struct RowOver448 {
  static constexpr bool kRow = false;
  template <typename Env>
  static Nothing prepare(const Env&) { return {}; }
  static void apply(Nothing, float (&v)[1]) { v[0] = v[0] == 0.0f ? 1.0f : v[0] / 448.0f; }
};
// The same of a maximum that is bounded by the one operand.
struct BoundedOver448 {
  static constexpr bool kRow = false;
  struct Prepared {
    float bound;
  };
  template <typename Env>
  static Prepared prepare(const Env& env) { return {*static_cast<const float*>(env.operands[0])}; }
  static void apply(const Prepared& p, float (&v)[1]) {
    if (v[0] == v[0] && !(v[0] <= p.bound)) v[0] = p.bound;  // a bound that is NaN too
    RowOver448::apply({}, v);
  }
  template <typename F>
  static void visit(F&& visit) { visit(0, false, 0.0f); }
};
struct AsGiven {  // no program: the scale itself
  template <typename Env>
  static Nothing prepare(const Env&) { return {}; }
  static void apply(Nothing, float (&)[1]) {}
};

}  // namespace inductor_ext
