// qk_norm_rope and qk_norm_rope_store behind C functions, for tests/kernels/test_qk_norm_rope_store.py.
#include "qk_norm_rope_store/qk_norm_rope_store.cuh"

#include "entry.h"

namespace {

// (v.float() / scale).clamp(-448, 448): operand 0 is an fp32 scale. What is left to the cast to FP8 is its saturation.
struct ByScale {
  static constexpr bool kRow = false;
  struct Prepared {
    float scale;
  };
  static Prepared prepare(const Env& env) { return {*static_cast<const float*>(env.operands[0])}; }
  template <int N>
  static void apply(const Prepared& prepared, float (&v)[N]) {
    for (float& each : v) each = each / prepared.scale;
  }
  template <typename F>
  static void visit(F&& visit) { visit(0, false, 0.0f); }
};
struct AsItIs {
  static constexpr bool kRow = false;
  struct Prepared {};
  static Prepared prepare(const Env&) { return {}; }
  template <int N>
  static void apply(const Prepared&, float (&)[N]) {}
  template <typename F>
  static void visit(F&&) {}
};

struct Call {  // of both: what the store does not have stays null
  const Given *k, *q, *v, *k_weight, *q_weight, *cos, *sin, *k_cache, *v_cache, *k_scale, *v_scale, *loc, *q_out, *k_out;
  int64_t mult, offset, wrap, keep_k, check;
};

template <typename T, typename Norm>
int turn(const Call& c, char* error, int length) {
  return attempt(error, length, [&] {
    QkNormRope<T, T, T, T, Norm>::run(view(*c.k), maybe(c.q), maybe(c.k_weight), maybe(c.q_weight), view(*c.cos), view(*c.sin), 1e-6,
                                      view(*c.k_out), view(*c.q_out));
  });
}
template <typename T, typename Norm, typename Cache, typename Program, typename Loc>
int store(const Call& c, char* error, int length) {
  return attempt(error, length, [&] {
    QkNormRopeStore<T, T, T, T, Norm, Cache, true, Program, Program, Loc>::run(
        view(*c.k), maybe(c.q), maybe(c.v), maybe(c.k_weight), maybe(c.q_weight), view(*c.cos), view(*c.sin), view(*c.k_cache),
        maybe(c.v_cache), maybe(c.k_scale), maybe(c.v_scale), maybe(c.loc), 1e-6, c.mult, c.offset, c.wrap != 0, c.keep_k != 0,
        c.check != 0, 0, 0, 0, 0, 0, 0, 0, 0, view(*c.q_out), view(*c.k_out));
  });
}

}  // namespace

// 0, or 1 with `error` filled.
#define VARIANT(name, T, Norm)                                                                                                  \
  extern "C" int turn_##name(const Call* c, char* error, int length) { return turn<T, Norm>(*c, error, length); }              \
  extern "C" int fp8_##name(const Call* c, char* error, int length) {                                                          \
    return store<T, Norm, __nv_fp8_e4m3, ByScale, int64_t>(*c, error, length);                                                 \
  }                                                                                                                             \
  extern "C" int copy_##name(const Call* c, char* error, int length) { return store<T, Norm, T, AsItIs, int32_t>(*c, error, length); }
VARIANT(bf16, __nv_bfloat16, CastThenWeight)
VARIANT(bf16_plain, __nv_bfloat16, NoNorm)
VARIANT(fp32_plain, float, NoNorm)
