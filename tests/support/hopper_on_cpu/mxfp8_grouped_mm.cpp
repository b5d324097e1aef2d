// mxfp8_grouped_mm's kernels for compute capability 9.0 behind a C function: tests/kernels/test_mxfp8_grouped_mm_hopper.py.
#include "mxfp8_grouped_mm/hopper.cuh"

#include "entry.h"

// 0, or 1 with `error` filled.
extern "C" int mxfp8_grouped_mm(const Given* x, const Given* x_scale, const Given* w, const Given* w_scale, const Given* offs,
                                const Given* out, int sms, char* error, int length) {
  return attempt(sms, hopper_on_cpu::seed, error, length, [&] {
    const TensorView x_view = view(*x), w_view = view(*w), w_scale_view = view(*w_scale), offs_view = view(*offs);
    using Made = Mxfp8GroupedMm<MXFP8_KIND, MXFP8_OUT, MXFP8_W, MXFP8_N, MXFP8_CLUSTER_W, MXFP8_CLUSTER_N>;
    Made::run(x_view, optional(x_scale), w_view, w_scale_view, offs_view, view(*out));
  });
}

extern "C" int mxfp8_to_bf16(const Given* x, const Given* scale, const Given* out, int sms, char* error, int length) {
  return attempt(sms, hopper_on_cpu::seed, error, length, [&] { Mxfp8ToBf16::run(view(*x), view(*scale), view(*out)); });
}
