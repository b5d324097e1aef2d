// The end of a kernel that holds a row in registers and whose scales are given: the row as FP8, once for each scale.
//
//   scale_i = scale_program(scales[i]);  out[i] = cast(program(y, scale_i))        out [N, R, C], or [R, C] for one
//
// No maximum is taken: y is quantised as soon as it is known. Without a scale (StaticScales<0, …>) the program holds it as a
// number, and there is one output.
#pragma once

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/quantize_row.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

constexpr int kMaxScales = 4;

struct StaticParams {  // among a kernel's parameters
  const void* scale[kMaxScales];
  int64_t out_pitch;  // bytes from one output to the next
};

template <int Count, typename S, typename ScaleProgram>
struct StaticScales {
  static constexpr int kOutputs = Count == 0 ? 1 : Count;
  Raw<S, 1> given[kOutputs];

  // The loads alone: the row's own follow at once, and nothing waits in between.
  __device__ __forceinline__ void load(const StaticParams& p) {
#pragma unroll
    for (int n = 0; n < Count; ++n) given[n].load(static_cast<const S*>(p.scale[n]));
  }
  __device__ __forceinline__ float scale(const Env& env, int n) const {
    if constexpr (Count == 0) {
      return 0.0f;
    } else {
      float value[1];
      given[n].unpack(value);
      ScaleProgram::apply(ScaleProgram::prepare(env), value);
      return value[0];
    }
  }
  // Host: checks the scales, and where `outs` outputs of `count` elements each lie.
  static void take(StaticParams& p, const Optional<TensorView> (&given)[kMaxScales], const TensorView& out, int64_t count, Device& device) {
    static constexpr const char* kNames[kMaxScales] = {"s0", "s1", "s2", "s3"};
    for (int n = 0; n < Count; ++n) {
      if (!given[n].has_value()) TVM_FFI_THROW(ValueError) << kNames[n] << ": wanted a tensor, found None";
      const TensorView& scale = given[n].value();
      TensorMatcher().dtype<S>().device(device).verify(scale, kNames[n]);
      if (scale.numel() != 1) TVM_FFI_THROW(ValueError) << kNames[n] << ": wanted one element, found shape " << shape_of(scale);
      p.scale[n] = data(scale);
    }
    if (out.numel() != kOutputs * count) {
      TVM_FFI_THROW(ValueError) << "out: wanted " << kOutputs << " times " << count << " elements, found shape " << shape_of(out);
    }
    p.out_pitch = count;
  }
};

// `out` is the row's place in the first output; those without a row do nothing.
template <typename Fp8, bool Saturated, typename Chain, typename Scales, int Threads, typename In, int E, int U>
__device__ __forceinline__ void downcast_row(const Raw<In, E> (&y)[U], const RowPlace<Threads>& at, const Scales& scales,
                                             const Consts& consts, int64_t cols, uint8_t* out, int64_t out_pitch) {
  if (at.row < 0) return;
  typename Chain::Prepared prepared[Scales::kOutputs];
#pragma unroll
  for (int n = 0; n < Scales::kOutputs; ++n) {
    Env env{consts, nullptr};
    env.scale = scales.scale(env, n);
    prepared[n] = Chain::prepare(env);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = u * at.threads + at.lane;
    if (i >= cols) continue;
#pragma unroll
    for (int n = 0; n < Scales::kOutputs; ++n) downcast_vector<In, Fp8, Saturated, Chain>(y[u], prepared[n], out + n * out_pitch + i * E);
  }
}

}  // namespace inductor_ext
