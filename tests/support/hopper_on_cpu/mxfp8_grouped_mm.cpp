// mxfp8_grouped_mm's kernels for compute capability 9.0 behind a C function: tests/kernels/test_mxfp8_grouped_mm_hopper.py.
#include "mxfp8_grouped_mm/hopper.cuh"

namespace inductor_ext {
__attribute__((aligned(1024))) uint8_t shared[kSharedBytes];
}

namespace {

using namespace inductor_ext;

struct Given {  // a tensor from Python
  void* pointer;
  int64_t ndim, bytes, sizes[3], strides[3];
};

TensorView view(const Given& given) {
  const uint8_t* begin = static_cast<uint8_t*>(given.pointer);
  hopper_on_cpu::spans.push_back({begin, begin + given.bytes});
  return {given.pointer, {given.sizes, given.sizes + given.ndim}, {given.strides, given.strides + given.ndim}};
}

}  // namespace

// 0, or 1 with `error` filled.
extern "C" int mxfp8_grouped_mm(const Given* x, const Given* x_scale, const Given* w, const Given* w_scale, const Given* offs,
                                const Given* out, int sms, char* error, int length) {
  multiprocessors = sms;
  hopper_on_cpu::spans.clear();
  try {
    Optional<TensorView> scale;
    if (x_scale != nullptr) scale = view(*x_scale);
    const TensorView x_view = view(*x), w_view = view(*w), w_scale_view = view(*w_scale), offs_view = view(*offs);
    Mxfp8GroupedMm<MXFP8_KIND, MXFP8_OUT, MXFP8_W, MXFP8_N>::run(x_view, scale, w_view, w_scale_view, offs_view, view(*out));
    return 0;
  } catch (const std::exception& failure) {
    std::strncpy(error, failure.what(), length - 1);
    return 1;
  }
}
