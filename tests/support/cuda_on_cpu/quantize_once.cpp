// A tensor's quantisation with one scale, in one launch and in two, behind C functions, for tests/kernels/test_quantize_once.py.
#include "act_quantize/act_quantize.cuh"
#include "fp8_quantize/fp8_quantize.cuh"
#include "norm_quantize/norm_quantize.cuh"

#include "../programs.h"
#include "entry.h"

namespace {

// scale = amax / 448 rounded to In: torchao's, as eager PyTorch on a CPU computes it.
template <typename In>
struct Over448 {
  static constexpr bool kRow = false;
  struct Prepared {};
  static Prepared prepare(const Env&) { return {}; }
  static void apply(Prepared, float (&v)[1]) { v[0] = to_float(from_float<In>(v[0] / 448.0f)); }
};

// 0, 1 with `error` filled, or 2 where `f` says that it wants y.
template <typename F>
int attempt_once(char* error, int length, F&& f) {
  bool wants_y = false;
  const int failed = attempt(error, length, [&] { wants_y = f(); });
  return wants_y ? 2 : failed;
}

}  // namespace

#define VARIANT(name, In, W)                                                                                                   \
  extern "C" int norm_##name(const Given* x, const Given* residual, const Given* weight, double eps, const Given* out,         \
                             const Given* scale, const Given* total, const Given* y, const Given* partial, char* error,        \
                             int length) {                                                                                     \
    return attempt_once(error, length, [&] {                                                                                   \
      const auto with = [&](auto has) {                                                                                        \
        using Op = NormQuantize<NormRow<In, W, In, decltype(has)::value ? Sum::kRounded : Sum::kNone, false, CastThenWeight, false>, false, __nv_fp8_e4m3, true, float, Over448<In>, ByScale>; \
        return Op::run(view(*x), maybe(residual), view(*weight), {}, {}, {}, eps, view(*out), view(*scale), view(*total), {}, maybe(y), maybe(partial), \
                       {}, 0, 0, 0, 0, 0, 0, 0, 0);                                                                                \
      };                                                                                                                       \
      return residual ? with(std::true_type{}) : with(std::false_type{});                                                      \
    });                                                                                                                        \
  }                                                                                                                            \
  extern "C" int act_mul_##name(const Given* gate, const Given* up, const Given* out, const Given* scale, const Given* y,      \
                                const Given* partial, char* error, int length) {                                               \
    using Op = ActQuantize<ActRow<In, Gated<PlusAbs>, Inputs::kTwo>, false, __nv_fp8_e4m3, true, float, Over448<In>, ByScale>;                           \
    return attempt_once(error, length, [&] {                                                                                   \
      return Op::run(view(*gate), view(*up), view(*out), view(*scale), maybe(y), maybe(partial), {}, 0, 0, 0, 0, 0, 0, 0, 0);      \
    });                                                                                                                        \
  }                                                                                                                            \
  extern "C" int alone_##name(const Given* x, const Given* out, const Given* scale, const Given* partial, char* error, int length) { \
    using Op = Fp8QuantizeTensor<In, __nv_fp8_e4m3, true, float, Over448<In>, ByScale>;                                        \
    return attempt(error, length, [&] { Op::run(view(*x), view(*out), view(*scale), view(*partial), {}, 0, 0, 0, 0, 0, 0, 0, 0); }); \
  }
// Beside a bound of the scale, which may be missing.
#define BOUNDED(name, Op, ...)                                                                                                  \
  extern "C" int bounded_##name(const Given* x, const Given* out, const Given* scale, const Given* bound, const Given* partial, \
                                char* error, int length) {                                                                      \
    return attempt(error, length, [&] {                                                                                         \
      Op<__nv_bfloat16, __nv_fp8_e4m3, true, float, BoundedOver448, ByScale>::run(view(*x), view(*out), view(*scale),           \
                                                                                  __VA_ARGS__ maybe(bound), 0, 0, 0, 0, 0, 0, 0, 0); \
    });                                                                                                                         \
  }
BOUNDED(row, Fp8QuantizeRow)
BOUNDED(tensor, Fp8QuantizeTensor, view(*partial),)
VARIANT(bf16, __nv_bfloat16, __nv_bfloat16)
VARIANT(fp16, __half, float)
VARIANT(fp32, float, float)

// The GPU, before the first call: its multiprocessors, blocks of one, and shared memory of one.
extern "C" void set_device(int sms, int blocks, int shared) { multiprocessors = sms, blocks_of_sm = blocks, shared_of_sm = shared; }
extern "C" uint32_t divided(uint32_t i, int64_t by, uint32_t* left) { return Divisor::of(by).divide(i, left); }
