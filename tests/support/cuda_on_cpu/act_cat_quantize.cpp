// Columns beside an activation, quantised with a scale a row, behind C functions, for test_act_cat_quantize.py.
#include "act_cat_quantize/act_cat_quantize.cuh"

#include "../programs.h"
#include "entry.h"

// 0, or 1 with `error` filled.
#define VARIANT(name, ...)                                                                                                       \
  extern "C" int name(const Given* x, const Given* gate, const Given* up, int x_first, const Given* out, const Given* scale, char* error, \
                      int length) {                                                                                              \
    return attempt(error, length, [&] {                                                                                          \
      ActCatQuantize<ActRow<__VA_ARGS__>, true, __nv_fp8_e4m3, true, float, RowOver448, ByScale>::run(                           \
          view(*x), view(*gate), maybe(up), x_first != 0, view(*out), view(*scale), {}, {}, {}, 0, 0, 0, 0, 0, 0, 0, 0);             \
    });                                                                                                                          \
  }
using B = __nv_bfloat16;
using H = __half;
using F = float;
// SiLU is PTX: PlusAbs stands for it.
extern "C" int bounded(const Given* x, const Given* gate, const Given* bound, const Given* out, const Given* scale, char* error, int length) {
  return attempt(error, length, [&] {
    ActCatQuantize<ActRow<B, Alone<PlusAbs>, Inputs::kOne>, true, __nv_fp8_e4m3, true, float, BoundedOver448, ByScale>::run(
        view(*x), view(*gate), {}, true, view(*out), view(*scale), {}, {}, maybe(bound), 0, 0, 0, 0, 0, 0, 0, 0);
  });
}
VARIANT(alone_bf16, B, Alone<PlusAbs>, Inputs::kOne)
VARIANT(alone_fp32, F, Alone<PlusAbs>, Inputs::kOne)
VARIANT(relu_squared, H, Alone<ReluSquared>, Inputs::kOne)
VARIANT(gelu_tanh, B, Alone<GeluTanh>, Inputs::kOne)
VARIANT(gelu_mul, B, Gated<Gelu>, Inputs::kTwo)
VARIANT(fp32_mul, B, GatedInFp32<PlusAbs>, Inputs::kTwo)
VARIANT(fp32_mul_pairs, B, GatedInFp32<PlusAbs>, Inputs::kPairs)
