// RMSNorm or LayerNorm, with or without a residual added before it, and FP8 with scales that are given, in one pass over memory.
//
//   total = round(x + residual);  r = rsqrt(mean(total²) + eps);  y = norm(total * r), rounded to x's dtype
//   scale_i = scale_program(scales[i]);  out[i] = cast(program(y, scale_i))
//
//   x, residual, the norm's operands, total and kept as norm_quantize.cuh has them; out [N, R, C], or [R, C] for one scale or none
//   s0..s3 are the scales, c0..c7 the constants of both programs
#pragma once

#include "inductor_ext/downcast_row.cuh"
#include "norm_quantize/norm_quantize.cuh"

namespace inductor_ext {

struct NormStaticParams : NormQuantizeParams {
  StaticParams given;
};

template <typename Row, typename Fp8, bool Saturated, typename Chain, typename Scales, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    norm_quantize_static_kernel(const __grid_constant__ NormStaticParams p) {
  __shared__ float shared_sum[kSharedSum<Row>];
  const auto place = RowPlace<Threads>::of(p.rows, blockIdx.x);
  Raw<typename Row::In, E> y[U];
  Scales scales;
  wait_for_previous_kernel();
  scales.load(p.given);
  norm_row<Row>(p, place, shared_sum, y);
  downcast_row<Fp8, Saturated, Chain>(y, place, scales, p.consts, p.cols, p.out + place.row * p.cols * E, p.given.out_pitch);
}

template <typename Row, typename Fp8, bool Saturated, typename Program, typename Scales>
struct NormQuantizeStatic {
  static_assert(!Program::kRow, "a scale is one for the whole tensor");
  using Chain = ToFp8<Program>;

  static void run(TensorView x, Optional<TensorView> residual, Optional<TensorView> weight, Optional<TensorView> bias,
                  Optional<TensorView> factor, Optional<TensorView> shift, double eps, TensorView out, TensorView total,
                  Optional<TensorView> kept, Optional<TensorView> s0, Optional<TensorView> s1, Optional<TensorView> s2,
                  Optional<TensorView> s3, double c0, double c1, double c2, double c3, double c4, double c5, double c6, double c7) {
    Device device;
    NormStaticParams p{};
    const Rows rows = take_norm<Row, Fp8>(p, {x, residual, {weight, bias, factor, shift}, eps, out, total, kept}, device);
    Scales::take(p.given, {s0, s1, s2, s3}, out, rows.rows * rows.cols, device);
    if (rows.rows == 0) return;
    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.consts = Consts::of(constants);
    const bool vectors = norm_in_vectors<Row>(p);
    DeviceGuard guard(device.id());
    if (vectors) p.cols /= 8;
    with_row_shape(rows.rows, rows.cols, vectors, sm_count(device.id()), Start{p, env_stream(device.id())});
  }

 private:
  struct Start {
    const NormStaticParams& p;
    cudaStream_t stream;
    template <int Threads, int E, int U>
    void operator()(unsigned grid, unsigned block) const {
      auto* kernel = norm_quantize_static_kernel<Row, Fp8, Saturated, Chain, Scales, Threads, E, U>;
      Launch(grid, block).stream(stream).programmatic().run(kernel, p);
    }
  };
};

}  // namespace inductor_ext
