// RMSNorm, with or without a residual added before it, and FP8 with scales that are given, in one pass over memory.
//
//   total = round(x + residual);  r = rsqrt(mean(total²) + eps);  y = norm(total * r, weight), rounded to x's dtype
//   scale_i = scale_program(scales[i]);  out[i] = cast(program(y, scale_i))
//
//   x, residual, weight and total as rms_norm_quantize.cuh has them; out [N, R, C], or [R, C] for one scale or none
//   s0..s3 are the scales, c0..c7 the constants of both programs
#pragma once

#include "inductor_ext/downcast_row.cuh"
#include "rms_norm_quantize/rms_norm_quantize.cuh"

namespace inductor_ext {

struct RmsNormStaticParams : RmsNormQuantizeParams {
  StaticParams given;
};

template <typename In, typename W, bool HasResidual, typename Norm, typename Fp8, bool Saturated, typename Chain, typename Scales, int Threads,
          int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    rms_norm_quantize_static_kernel(const __grid_constant__ RmsNormStaticParams p) {
  __shared__ float shared_sum[32];
  const auto place = RowPlace<Threads>::of(p.rows, blockIdx.x);
  Raw<In, E> y[U];
  Scales scales;
  wait_for_previous_kernel();
  scales.load(p.given);
  rms_norm_row<In, W, HasResidual, Norm>(p, place, shared_sum, y);
  downcast_row<Fp8, Saturated, Chain>(y, place, scales, p.consts, p.cols, p.out + place.row * p.cols * E, p.given.out_pitch);
}

template <typename In, typename W, bool HasResidual, typename Norm, typename Fp8, bool Saturated, typename Program, typename Scales>
struct RmsNormQuantizeStatic {
  static_assert(!Program::kRow, "a scale is one for the whole tensor");
  using Chain = ToFp8<Program>;

  static void run(TensorView x, Optional<TensorView> residual, TensorView weight, double eps, TensorView out, TensorView total,
                  Optional<TensorView> s0, Optional<TensorView> s1, Optional<TensorView> s2, Optional<TensorView> s3, double c0, double c1,
                  double c2, double c3, double c4, double c5, double c6, double c7) {
    Device device;
    RmsNormStaticParams p{};
    const Rows rows = take_norm<In, W, HasResidual, Fp8>(p, x, residual, weight, eps, out, total, device);
    Scales::take(p.given, {s0, s1, s2, s3}, out, rows.rows * rows.cols, device);
    if (rows.rows == 0) return;
    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.consts = Consts::of(constants);
    const bool vectors = norm_in_vectors<In, HasResidual>(p);
    DeviceGuard guard(device.id());
    if (vectors) p.cols /= 8;
    with_row_shape(rows.rows, rows.cols, vectors, sm_count(device.id()), Start{p, env_stream(device.id())});
  }

 private:
  struct Start {
    const RmsNormStaticParams& p;
    cudaStream_t stream;
    template <int Threads, int E, int U>
    void operator()(unsigned grid, unsigned block) const {
      auto* kernel = rms_norm_quantize_static_kernel<In, W, HasResidual, Norm, Fp8, Saturated, Chain, Scales, Threads, E, U>;
      Launch(grid, block).stream(stream).programmatic().run(kernel, p);
    }
  };
};

}  // namespace inductor_ext
