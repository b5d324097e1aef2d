// The program of a cache with a scale, for kernels that run on the CPU.
#pragma once

#include "inductor_ext/steps.cuh"

// (v.float() / scale).clamp(-448, 448): operand 0 is an fp32 scale. What is left to the cast to FP8 is its saturation.
struct ByScale {
  static constexpr bool kRow = false;
  struct Prepared {
    float scale;
  };
  static Prepared prepare(const inductor_ext::Env& env) { return {*static_cast<const float*>(env.operands[0])}; }
  template <int N>
  static void apply(const Prepared& prepared, float (&v)[N]) {
    for (float& each : v) each = each / prepared.scale;
  }
  template <typename F>
  static void visit(F&& visit) { visit(0, false, 0.0f); }
};
