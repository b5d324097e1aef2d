// Norms of every kind quantised with a scale a row, one for all and a given one, behind C functions, for test_norm_quantize.py.
#include "norm_quantize/static_scale.cuh"

#include "../programs.h"
#include "entry.h"

namespace {

template <typename Row>
struct Norms {
  static bool run(char mode, const Given* x, const Given* residual, const Given* weight, const Given* bias, const Given* factor,
                  const Given* shift, double eps, const Given* out, const Given* scale, const Given* total, const Given* kept, const Given* y,
                  const Given* partial) {
    const auto of = [](const Given* given) { return given ? view(*given) : TensorView{nullptr, {0}, {1}}; };
    if (mode == 's') {
      NormQuantizeStatic<Row, __nv_fp8_e4m3, true, ByScale, StaticScales<1, float, AsGiven>>::run(
          view(*x), maybe(residual), maybe(weight), maybe(bias), maybe(factor), maybe(shift), eps, view(*out), of(total), maybe(kept), maybe(scale),
          {}, {}, {}, 0, 0, 0, 0, 0, 0, 0, 0);
      return false;
    }
    const auto dynamic = [&](auto rowwise) {
      return NormQuantize<Row, decltype(rowwise)::value, __nv_fp8_e4m3, true, float, RowOver448, ByScale>::run(
          view(*x), maybe(residual), maybe(weight), maybe(bias), maybe(factor), maybe(shift), eps, view(*out), view(*scale), of(total), maybe(kept),
          maybe(y), maybe(partial), {}, 0, 0, 0, 0, 0, 0, 0, 0);
    };
    return mode == 'r' ? dynamic(std::true_type{}) : dynamic(std::false_type{});
  }
};

}  // namespace

// 0, 1 with `error` filled, or 2 where y is wanted.
#define VARIANT(name, ...)                                                                                                          \
  extern "C" int name(int mode, const Given* x, const Given* residual, const Given* weight, const Given* bias, const Given* factor, \
                      const Given* shift, double eps, const Given* out, const Given* scale, const Given* total, const Given* kept,  \
                      const Given* y, const Given* partial, char* error, int length) {                                              \
    bool wants_y = false;                                                                                                           \
    const int failed = attempt(error, length, [&] {                                                                                 \
      wants_y = Norms<__VA_ARGS__>::run(static_cast<char>(mode), x, residual, weight, bias, factor, shift, eps, out, scale, total,  \
                                        kept, y, partial);                                                                          \
    });                                                                                                                             \
    return wants_y ? 2 : failed;                                                                                                    \
  }
using B = __nv_bfloat16;
using H = __half;
using F = float;
// The types are those of kernels/norms.py's row_type for the programs of the test.
VARIANT(layer_bf16, NormRow<B, B, B, Sum::kNone, true, NormSteps<Times<kWeight>, Plus<kBias>>, false>)
VARIANT(layer_fp16, NormRow<H, F, H, Sum::kRounded, true, NormSteps<Times<kWeight>, Plus<kBias>>, true>)
VARIANT(layer_fp32, NormRow<F, F, F, Sum::kRounded, true, NormSteps<>, false>)
VARIANT(layer_wide, NormRow<B, F, B, Sum::kWide, true, NormSteps<NormCast, Times<kWeight>, NormCast, Plus<kBias>>, true>)
VARIANT(modulated, NormRow<B, B, B, Sum::kNone, true, NormSteps<NormCast, Times<kFactor, OnePlusRounded>, NormCast, Plus<kShift>>, false>)
VARIANT(modulated_fp32, NormRow<B, B, F, Sum::kNone, true, NormSteps<Times<kFactor, OnePlus>, Plus<kShift>>, true>)
VARIANT(rms_wide, NormRow<B, B, B, Sum::kWide, false, CastThenWeight, false>)
VARIANT(rms_wide_gemma, NormRow<B, B, B, Sum::kWide, false, NormSteps<Times<kWeight, OnePlusRounded>>, true>)
VARIANT(rms_kept, NormRow<B, B, B, Sum::kRounded, false, CastThenWeight, true>)
VARIANT(rms_alone, NormRow<H, H, H, Sum::kNone, false, NormSteps<>, false>)
VARIANT(rms_biased, NormRow<B, B, B, Sum::kNone, false, NormSteps<Times<kWeight>, Plus<kBias>, Times<kFactor>>, true>)

// The GPU, before the first call: its multiprocessors, blocks of one, and shared memory of one.
extern "C" void set_device(int sms, int blocks, int shared) { multiprocessors = sms, blocks_of_sm = blocks, shared_of_sm = shared; }
