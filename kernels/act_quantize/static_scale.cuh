// An activation, gated or not, and FP8 with scales that are given, in one pass over memory.
//
//   y = form(gate, up);  scale_i = scale_program(scales[i]);  out[i] = cast(program(y, scale_i))
//
//   gate, up as act_quantize.cuh has them; out [N, R, C], or [R, C] for one scale or none
//   s0..s3 are the scales, c0..c7 the constants of both programs
#pragma once

#include "act_quantize/act_quantize.cuh"
#include "inductor_ext/downcast_row.cuh"

namespace inductor_ext {

struct ActStaticParams : ActQuantizeParams {
  StaticParams given;
};

template <typename Row, typename Fp8, bool Saturated, typename Chain, typename Scales, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    act_quantize_static_kernel(const __grid_constant__ ActStaticParams p) {
  const auto place = RowPlace<Threads>::of(p.rows, blockIdx.x);
  Raw<typename Row::In, E> y[U];
  Scales scales;
  wait_for_previous_kernel();
  scales.load(p.given);
  act_row<Row>(p, place, y);
  downcast_row<Fp8, Saturated, Chain>(y, place, scales, p.consts, p.cols, p.out + place.row * p.cols * E, p.given.out_pitch);
}

template <typename Row, typename Fp8, bool Saturated, typename Program, typename Scales>
struct ActQuantizeStatic {
  static_assert(!Program::kRow, "a scale is one for the whole tensor");
  using Chain = ToFp8<Program>;

  static void run(TensorView gate, Optional<TensorView> up, TensorView out, Optional<TensorView> s0, Optional<TensorView> s1,
                  Optional<TensorView> s2, Optional<TensorView> s3, double c0, double c1, double c2, double c3, double c4, double c5,
                  double c6, double c7) {
    Device device;
    ActStaticParams p{};
    const Rows rows = take_inputs<Row, Fp8>(p, gate, up, out, device);
    Scales::take(p.given, {s0, s1, s2, s3}, out, rows.rows * rows.cols, device);
    if (rows.rows == 0) return;
    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.consts = Consts::of(constants);
    const bool vectors = inputs_in_vectors<Row>(p);
    DeviceGuard guard(device.id());
    if (vectors) p.cols /= 8;
    with_row_shape(rows.rows, rows.cols, vectors, sm_count(device.id()), Start{p, env_stream(device.id())});
  }

 private:
  struct Start {
    const ActStaticParams& p;
    cudaStream_t stream;
    template <int Threads, int E, int U>
    void operator()(unsigned grid, unsigned block) const {
      auto* kernel = act_quantize_static_kernel<Row, Fp8, Saturated, Chain, Scales, Threads, E, U>;
      Launch(grid, block).stream(stream).programmatic().run(kernel, p);
    }
  };
};

}  // namespace inductor_ext
