// qk_norm_rope and qk_norm_rope_store behind C functions, for tests/kernels/test_qk_norm_rope_store.py.
#include "qk_norm_rope_store/qk_norm_rope_store.cuh"

#include "by_scale.h"
#include "entry.h"

namespace {

struct NoSteps {
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
  int64_t rotary, mult, offset, wrap, keep_k, check;
};

template <typename T, typename Norm, typename Turn>
int turn(const Call& c, char* error, int length) {
  return attempt(error, length, [&] {
    QkNormRope<T, T, T, T, Norm, Turn>::turn(view(*c.k), maybe(c.q), maybe(c.k_weight), maybe(c.q_weight), view(*c.cos), view(*c.sin),
                                             1e-6, c.rotary, view(*c.k_out), view(*c.q_out));
  });
}
template <typename T, typename Norm, typename Turn, typename Cache, typename Program, typename Loc>
int store(const Call& c, char* error, int length) {
  return attempt(error, length, [&] {
    QkNormRopeStore<T, T, T, T, Norm, Cache, true, Program, Program, Loc, Turn>::turn(
        view(*c.k), maybe(c.q), maybe(c.v), maybe(c.k_weight), maybe(c.q_weight), view(*c.cos), view(*c.sin), view(*c.k_cache),
        maybe(c.v_cache), maybe(c.k_scale), maybe(c.v_scale), maybe(c.loc), 1e-6, c.rotary, c.mult, c.offset, c.wrap != 0,
        c.keep_k != 0, c.check != 0, 0, 0, 0, 0, 0, 0, 0, 0, view(*c.q_out), view(*c.k_out));
  });
}

}  // namespace

// 0, or 1 with `error` filled.
#define VARIANT(name, T, Norm, Turn)                                                                                            \
  extern "C" int turn_##name(const Call* c, char* error, int length) { return turn<T, Norm, Turn>(*c, error, length); }        \
  extern "C" int fp8_##name(const Call* c, char* error, int length) {                                                          \
    return store<T, Norm, Turn, __nv_fp8_e4m3, ByScale, int64_t>(*c, error, length);                                           \
  }                                                                                                                             \
  extern "C" int copy_##name(const Call* c, char* error, int length) {                                                         \
    return store<T, Norm, Turn, T, NoSteps, int32_t>(*c, error, length);                                                       \
  }
VARIANT(bf16, __nv_bfloat16, CastThenWeight, Halves)
VARIANT(bf16_plain, __nv_bfloat16, NoNorm, Halves)
VARIANT(fp32_plain, float, NoNorm, Halves)

using HalvesOfHalfTables = Turn<false, true, false>;
using PartialHalves = Turn<false, false, true>;
using PartialHalvesOfHalfTables = Turn<false, true, true>;
using Pairs = Turn<true, false, false>;
using PairsOfHalfTables = Turn<true, true, false>;
using PartialPairs = Turn<true, false, true>;
using PartialPairsOfHalfTables = Turn<true, true, true>;
using PairsOfOneTable = Turn<true, true, false, true>;
using PartialPairsOfOneTable = Turn<true, true, true, true>;
VARIANT(bf16_plain_1101, __nv_bfloat16, NoNorm, PairsOfOneTable)
VARIANT(fp32_plain_1111, float, NoNorm, PartialPairsOfOneTable)
VARIANT(bf16_1111, __nv_bfloat16, CastThenWeight, PartialPairsOfOneTable)
VARIANT(bf16_plain_010, __nv_bfloat16, NoNorm, HalvesOfHalfTables)
VARIANT(bf16_plain_001, __nv_bfloat16, NoNorm, PartialHalves)
VARIANT(fp32_plain_011, float, NoNorm, PartialHalvesOfHalfTables)
VARIANT(bf16_011, __nv_bfloat16, CastThenWeight, PartialHalvesOfHalfTables)
VARIANT(fp32_plain_100, float, NoNorm, Pairs)
VARIANT(bf16_plain_110, __nv_bfloat16, NoNorm, PairsOfHalfTables)
VARIANT(fp32_plain_110, float, NoNorm, PairsOfHalfTables)
VARIANT(bf16_plain_101, __nv_bfloat16, NoNorm, PartialPairs)
VARIANT(bf16_111, __nv_bfloat16, CastThenWeight, PartialPairsOfHalfTables)
