// Activations of every form quantised with a scale a row, one for all and a given one, behind C functions, for test_act_quantize.py.
#include "act_quantize/static_scale.cuh"

#include "../programs.h"
#include "entry.h"

namespace {

template <typename Row>
bool run(char mode, const Given* gate, const Given* up, const Given* out, const Given* scale, const Given* y, const Given* partial) {
  if (mode == 's') {
    ActQuantizeStatic<Row, __nv_fp8_e4m3, true, ByScale, StaticScales<1, float, AsGiven>>::run(
        view(*gate), maybe(up), view(*out), maybe(scale), {}, {}, {}, 0, 0, 0, 0, 0, 0, 0, 0);
    return false;
  }
  const auto dynamic = [&](auto rowwise) {
    return ActQuantize<Row, decltype(rowwise)::value, __nv_fp8_e4m3, true, float, RowOver448, ByScale>::run(
        view(*gate), maybe(up), view(*out), view(*scale), maybe(y), maybe(partial), {}, 0, 0, 0, 0, 0, 0, 0, 0);
  };
  return mode == 'r' ? dynamic(std::true_type{}) : dynamic(std::false_type{});
}

}  // namespace

// 0, 1 with `error` filled, or 2 where y is wanted.
#define VARIANT(name, ...)                                                                                                            \
  extern "C" int name(int mode, const Given* gate, const Given* up, const Given* out, const Given* scale, const Given* y,             \
                      const Given* partial, char* error, int length) {                                                                \
    bool wants_y = false;                                                                                                             \
    const int failed = attempt(error, length, [&] { wants_y = run<ActRow<__VA_ARGS__>>(static_cast<char>(mode), gate, up, out, scale, y, partial); }); \
    return wants_y ? 2 : failed;                                                                                                      \
  }
using B = __nv_bfloat16;
using H = __half;
using F = float;
// SiLU of bf16 is PTX: PlusAbs stands for it in the forms that are not of one activation alone.
VARIANT(alone_bf16, B, Alone<PlusAbs>, Inputs::kOne)
VARIANT(alone_fp32, F, Alone<PlusAbs>, Inputs::kOne)
VARIANT(gelu, B, Alone<Gelu>, Inputs::kOne)
VARIANT(gelu_tanh, H, Alone<GeluTanh>, Inputs::kOne)
VARIANT(gelu_mul, B, Gated<Gelu>, Inputs::kTwo)
VARIANT(quick_gelu, B, Alone<QuickGelu>, Inputs::kOne)
VARIANT(quick_gelu_fp16, H, Alone<QuickGelu>, Inputs::kOne)
VARIANT(relu_squared, B, Alone<ReluSquared>, Inputs::kOne)
VARIANT(relu_squared_mul, H, Gated<ReluSquared>, Inputs::kTwo)
VARIANT(fp32_mul, B, GatedInFp32<PlusAbs>, Inputs::kTwo)
VARIANT(fp32_silu_mul, B, GatedInFp32<Silu>, Inputs::kTwo)
VARIANT(fp32_mul_pairs, B, GatedInFp32<PlusAbs>, Inputs::kPairs)
VARIANT(pairs_fp32, F, Gated<PlusAbs>, Inputs::kPairs)
VARIANT(clamped, B, ClampedSwiglu, Inputs::kTwo)
VARIANT(clamped_pairs, B, ClampedSwiglu, Inputs::kPairs)
VARIANT(clamped_fp16, H, ClampedSwiglu, Inputs::kTwo)

// 65 536 values, eight at a time, off the table and computed.
#define TABLE(name, ...)                                                                                                    \
  extern "C" int name(const B* in, B* read, B* computed, char* error, int length) {                                        \
    return attempt(error, length, [&] { every_value<__VA_ARGS__>(in, read, computed); });                                  \
  }
template <typename Form>
void every_value(const B* in, B* read, B* computed) {
  using Vector = Raw<B, 8>;
  static typename Tabled<Form>::Table table;
  threadIdx = dim3(0), blockDim = dim3(1);
  table.fill();
  for (int i = 0; i < 65536; i += 8) {
    Vector y, up;
    std::memcpy(&y, in + i, sizeof y);
    for (int e = 0; e < 8; ++e) up.values[e] = from_float<B>(e - 7.5f * (i % 3));
    Vector other = y;
    Tabled<Form>::apply(table, y, up), Form::template apply<B>(other, up);
    std::memcpy(read + i, &y, sizeof y), std::memcpy(computed + i, &other, sizeof other);
  }
}
TABLE(table_of_gelu, Alone<Gelu>)
TABLE(table_of_gelu_tanh, Alone<GeluTanh>)
TABLE(table_of_quick_gelu, Alone<QuickGelu>)
TABLE(table_of_gelu_mul, Gated<Gelu>)
TABLE(table_of_clamped, ClampedSwiglu)

// The GPU, before the first call: its multiprocessors, blocks of one, and shared memory of one.
extern "C" void set_device(int sms, int blocks, int shared) { multiprocessors = sms, blocks_of_sm = blocks, shared_of_sm = shared; }
