// Whether a division that is only followed by clamps and the cast to FP8 may be NearDivisor's: counts where the two differ.
//   near_midpoints   every 24-bit d and every odd m below 32 (FP8 boundaries, up to a power of two, have such a significand),
//                    all fp32 v within 4 ulp of m * d: the quotient lies on the same side of m, or on m, either way. Scaling v
//                    and d by powers of two changes nothing, so this is all of fp32 for which the cast could notice.
//   all_pairs        every v and every d of a 16-bit dtype: the same quotient, rounded to that dtype.
//   random           fp32 of any bits, and ordinary ones: the same FP8 bytes; differences beyond 1 ulp are counted too.
// Quotients below 2^-79 or above 2^60 need only be so too, with the right sign.
#include <tvm/ffi/function.h>
#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"
using namespace inductor_ext;

__device__ void count(bool same, float v, float d, float q, float wanted, unsigned long long* wrong, float* first) {
  if (!same && atomicAdd(wrong, 1ull) == 0) first[0] = v, first[1] = d, first[2] = q, first[3] = wanted;
}
__device__ float near(const NearDivisor& divisor, float v) {
  float q[1] = {v};
  divisor.divide(q);
  return q[0];
}
__device__ bool same_bits(float a, float b) { return __float_as_uint(a) == __float_as_uint(b) || (isnan(a) && isnan(b)); }
__device__ bool both_extreme(float a, float b) {
  const bool tiny = fabsf(a) < 0x1p-79f && fabsf(b) < 0x1p-79f, huge = fabsf(a) > 0x1p60f && fabsf(b) > 0x1p60f;
  return (tiny || huge) && signbit(a) == signbit(b);
}
__device__ bool within_an_ulp(float a, float b) {
  return same_bits(a, b) || abs(static_cast<int>(__float_as_uint(a)) - static_cast<int>(__float_as_uint(b))) <= 1;
}

__global__ void near_midpoints_kernel(unsigned long long* wrong, float* first) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;  // 2^23 significands
  const float d = __uint_as_float(0x3f800000u | i);
  const NearDivisor divisor = NearDivisor::of(d);
  for (int m = 1; m < 32; m += 2) {
    const uint32_t centre = __float_as_uint(__fmul_rn(d, m));
    for (int step = -4; step <= 4; ++step) {
      const float v = __uint_as_float(centre + step);
      const float q = near(divisor, v), wanted = __fdiv_rn(v, d);
      count((q < m) == (wanted < m) && (q > m) == (wanted > m), v, d, q, wanted, wrong, first);
    }
  }
}
template <typename T>
__global__ void all_pairs_kernel(unsigned long long* wrong, float* first) {
  const T divisor_value = *reinterpret_cast<const T*>(&reinterpret_cast<const unsigned short&>(blockIdx.x));
  const float d = to_float(divisor_value);
  const NearDivisor divisor = NearDivisor::of(d);
  for (uint32_t bits = threadIdx.x; bits < 65536; bits += blockDim.x) {
    const unsigned short pattern = static_cast<unsigned short>(bits);
    const float v = to_float(*reinterpret_cast<const T*>(&pattern));
    const float q = near(divisor, v), wanted = __fdiv_rn(v, d);
    const bool rounded = within_an_ulp(q, wanted) && same_bits(round_to<T>(q), round_to<T>(wanted));
    count(rounded || both_extreme(q, wanted), v, d, q, wanted, wrong, first);
  }
}
__device__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
__device__ uint32_t byte_of(float v, int kind) {
  const uint32_t byte = kind == 0 ? cast_pair<__nv_fp8_e4m3, false>(v, 0.0f) : cast_pair<__nv_fp8_e5m2, false>(v, 0.0f);
  return byte & 0xff;
}
__global__ void random_bits_kernel(uint64_t seed, unsigned long long* wrong, float* first) {
  const uint64_t h = mix(seed + static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  const float d = __uint_as_float(static_cast<uint32_t>(h));
  const NearDivisor divisor = NearDivisor::of(d);
  for (int j = 0; j < 64; ++j) {
    const uint64_t r = mix(h + j + 1);
    float v = __uint_as_float(static_cast<uint32_t>(r));
    if (j % 2)
      v = __fmul_rn(d, ldexpf(static_cast<float>(static_cast<uint32_t>(r) & 0xffffff), static_cast<int>(r >> 32 & 31) - 38));
    const float q = near(divisor, v), wanted = __fdiv_rn(v, d);
    const bool nan = isnan(q) && isnan(wanted);
    const bool bytes = byte_of(q, 0) == byte_of(wanted, 0) && byte_of(q, 1) == byte_of(wanted, 1);
    const bool close = within_an_ulp(q, wanted) || both_extreme(q, wanted);
    count(nan || (close && bytes), v, d, q, wanted, wrong, first);
  }
}

static void start(int64_t blocks, const TensorView& wrong, const TensorView& first,
                  void (*kernel)(unsigned long long*, float*)) {
  Launch(static_cast<unsigned>(blocks), 256).stream(env_stream(wrong.device().device_id))
      .run(kernel, data<unsigned long long>(wrong), data<float>(first));
}
static void near_midpoints(TensorView wrong, TensorView first) { start(1 << 15, wrong, first, near_midpoints_kernel); }
static void all_bf16(TensorView wrong, TensorView first) { start(65536, wrong, first, all_pairs_kernel<__nv_bfloat16>); }
static void all_f16(TensorView wrong, TensorView first) { start(65536, wrong, first, all_pairs_kernel<__half>); }
static void random_bits(TensorView wrong, TensorView first, int64_t seed) {
  Launch(1 << 18, 256).stream(env_stream(wrong.device().device_id))
      .run(random_bits_kernel, static_cast<uint64_t>(seed), data<unsigned long long>(wrong), data<float>(first));
}
