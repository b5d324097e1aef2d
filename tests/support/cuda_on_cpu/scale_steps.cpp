// The steps of scales, each program behind a C function, for tests/kernels/test_scale_steps.py.
#include "inductor_ext/steps.cuh"

inline double __longlong_as_double(long long bits) {
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __drcp_rn(double v) { return 1.0 / v; }
inline float __double2float_rn(double v) { return static_cast<float>(v); }

namespace inductor_ext {

template <int I>
struct Const {
  static constexpr bool kTensor = false, kRow = false;
  static float get(const Env& env) { return env.consts.value[I]; }
};
struct Scale {
  static constexpr bool kTensor = true, kRow = false;
  static float get(const Env& env) { return env.scale; }
};
template <typename T, typename Operand>
float fetch(const Env& env) { return Operand::kTensor ? to_float(from_float<T>(Operand::get(env))) : Operand::get(env); }

}  // namespace inductor_ext

#include "inductor_ext/scale_steps.cuh"

namespace inductor_ext {

template <typename... S>
struct Steps {
  struct Prepared {};
  struct Given {
    const Env& env;
  };
  static Given prepare(const Env& env) { return {env}; }
  template <int N>
  static void apply(const Given& given, float (&v)[N]) { (S::apply(S::prepare(given.env), v), ...); }
};

template <typename Program>
void run(const float* in, float* out, int count, const double* numbers, float scale) {
  double padded[kMaxConsts] = {};
  std::copy(numbers, numbers + kMaxConsts, padded);
  const Consts consts = Consts::of(padded);
  Env env{consts, nullptr};
  env.scale = scale;
  for (int i = 0; i < count; ++i) {
    float v[1] = {in[i]};
    Program::apply(Program::prepare(env), v);
    out[i] = v[0];
  }
}

}  // namespace inductor_ext

using namespace inductor_ext;
#define PROGRAM(name, ...)                                                                                     \
  extern "C" void name(const float* in, float* out, int count, const double* numbers, float scale) {           \
    run<Steps<__VA_ARGS__>>(in, out, count, numbers, scale);                                                   \
  }
PROGRAM(add, Add<float, Const<0>>)
PROGRAM(positive_or, PositiveOr<float, Const<0>>)
PROGRAM(nonzero_or, NonzeroOr<float, Const<0>>)
PROGRAM(down_to_a_power, Abs<float>, Log2<float>, Floor<float>, Exp2<float>)
PROGRAM(up_to_a_power, Log2<float>, Ceil<float>, Pow2<float>)
PROGRAM(bits_up, BitsUp<float>)
PROGRAM(ue8m0, Ue8m0<float>)
PROGRAM(torchao, Wide<wide::Max<0x3d719799812dea11ull>, wide::Recip, wide::Mul<0x407c000000000000ull>>)
PROGRAM(in_double, Wide<wide::Add<0x3fb999999999999aull>, wide::Min<0x4059000000000000ull>, wide::Div<0x4080000000000000ull>>)
PROGRAM(through, Add<float, Through<Scale, Steps<Add<float, Const<0>>, Abs<float>>>>)
