// Norms and gated activations quantised with given scales, behind C functions, for tests/kernels/test_static_scale.py.
#include "act_quantize/static_scale.cuh"
#include "norm_quantize/static_scale.cuh"

#include "../programs.h"
#include "entry.h"

namespace {

template <typename S>
struct Reciprocal {
  static Nothing prepare(const Env&) { return {}; }
  static void apply(Nothing, float (&v)[1]) { v[0] = to_float(from_float<S>(1.0f / v[0])); }
};

// x * scale in In, and the same times the call's first number.
template <typename In, bool Number>
struct Times {
  static constexpr bool kRow = false;
  struct Prepared {
    float factor;
  };
  static Prepared prepare(const Env& env) { return {Number ? env.consts.value[0] : to_float(from_float<In>(env.scale))}; }
  template <int N>
  static void apply(const Prepared& p, float (&v)[N]) {
    for (float& each : v) each = to_float(from_float<In>(each * p.factor));
  }
};

// Calls f(Program, Scales) of a recipe: 'd' divides by `count` scales, 'r' multiplies by their reciprocals, 'n' by a number.
template <typename In, typename S, typename F>
void with_recipe(char recipe, int count, F&& f) {
  if (recipe == 'n') return f(Times<In, true>{}, StaticScales<0, float, AsGiven>{});
  if (recipe == 'r') return f(Times<In, false>{}, StaticScales<1, S, Reciprocal<S>>{});
  if (count == 1) return f(ByScale{}, StaticScales<1, S, AsGiven>{});
  if (count == 3) return f(ByScale{}, StaticScales<3, S, AsGiven>{});
  f(ByScale{}, StaticScales<4, S, AsGiven>{});
}

}  // namespace

#define VARIANT(name, In, W, S)                                                                                                     \
  extern "C" int norm_##name(int recipe, int count, const Given* x, const Given* residual, const Given* weight, double eps,         \
                             const Given* out, const Given* total, const Given* s0, const Given* s1, const Given* s2,               \
                             const Given* s3, double c0, char* error, int length) {                                                 \
    return attempt(error, length, [&] {                                                                                             \
      with_recipe<In, S>(recipe, count, [&](auto program, auto scales) {                                                            \
        const auto run = [&](auto has) {                                                                                            \
          using Op = NormQuantizeStatic<NormRow<In, W, In, decltype(has)::value ? Sum::kRounded : Sum::kNone, false, CastThenWeight, false>, __nv_fp8_e4m3, true, decltype(program), decltype(scales)>; \
          Op::run(view(*x), maybe(residual), view(*weight), {}, {}, {}, eps, view(*out), view(*total), {}, maybe(s0), maybe(s1), maybe(s2), maybe(s3), \
                  c0, 0, 0, 0, 0, 0, 0, 0);                                                                                         \
        };                                                                                                                          \
        residual ? run(std::true_type{}) : run(std::false_type{});                                                                  \
      });                                                                                                                           \
    });                                                                                                                             \
  }                                                                                                                                 \
  extern "C" int act_mul_##name(int recipe, int count, const Given* gate, const Given* up, const Given* out, const Given* s0,       \
                                const Given* s1, const Given* s2, const Given* s3, double c0, char* error, int length) {            \
    return attempt(error, length, [&] {                                                                                             \
      with_recipe<In, S>(recipe, count, [&](auto program, auto scales) {                                                            \
        using Op = ActQuantizeStatic<ActRow<In, Gated<PlusAbs>, Inputs::kTwo>, __nv_fp8_e4m3, true, decltype(program), decltype(scales)>;                     \
        Op::run(view(*gate), view(*up), view(*out), maybe(s0), maybe(s1), maybe(s2), maybe(s3), c0, 0, 0, 0, 0, 0, 0, 0);           \
      });                                                                                                                           \
    });                                                                                                                             \
  }
VARIANT(bf16, __nv_bfloat16, __nv_bfloat16, float)
VARIANT(fp16, __half, float, __half)
VARIANT(fp32, float, float, __nv_bfloat16)
