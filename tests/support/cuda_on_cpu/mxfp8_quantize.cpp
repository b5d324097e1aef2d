// mxfp8_quantize's kernels behind a C function, for tests/kernels/test_mxfp8_quantize.py.
#include <functional>

#include "mxfp8_quantize/mxfp8_quantize.cuh"

namespace {

using namespace inductor_ext;

struct Given {  // a tensor from Python
  void* pointer;
  int64_t ndim, bytes, sizes[3], strides[3];
};

TensorView view(const Given& given) {
  spans.push_back({static_cast<char*>(given.pointer), static_cast<char*>(given.pointer) + given.bytes});
  return {given.pointer, {given.sizes, given.sizes + given.ndim}, {given.strides, given.strides + given.ndim}};
}

template <typename In, typename Rounding>
void run(const Given& x, const Given* offs, const Given& data, const Given& scales, bool swizzled) {
  spans.clear();
  const TensorView x_view = view(x), data_view = view(data), scales_view = view(scales);
  if (!swizzled) return Mxfp8QuantizePlain<In, Rounding>::run(x_view, data_view, scales_view);
  Mxfp8QuantizeSwizzled<In, Rounding>::run(x_view, offs ? Optional<TensorView>(view(*offs)) : std::nullopt, data_view, scales_view);
}

template <typename In>
void run(const Given& x, const Given* offs, const Given& data, const Given& scales, bool swizzled, bool floor) {
  floor ? run<In, mx::Floor>(x, offs, data, scales, swizzled) : run<In, mx::Rceil>(x, offs, data, scales, swizzled);
}

}  // namespace

// 0, or 1 with `error` filled.
extern "C" int mxfp8_quantize(int bits, const Given* x, const Given* offs, const Given* data, const Given* scales, bool swizzled,
                              bool floor, int sms, char* error, int length) {
  multiprocessors = sms;
  try {
    if (bits == 32) run<float>(*x, offs, *data, *scales, swizzled, floor);
    if (bits == 16) run<__half>(*x, offs, *data, *scales, swizzled, floor);
    if (bits == -16) run<__nv_bfloat16>(*x, offs, *data, *scales, swizzled, floor);
    return 0;
  } catch (const std::exception& failure) {
    std::strncpy(error, failure.what(), length - 1);
    return 1;
  }
}

// The arithmetic of mx.cuh, for every bit pattern that a test asks for.
extern "C" void mx_scales(const uint32_t* amax, int64_t count, bool floor, uint8_t* bytes, uint32_t* factors) {
  for (int64_t i = 0; i < count; ++i) {
    bytes[i] = floor ? mx::Floor::byte(amax[i]) : mx::Rceil::byte(amax[i]);
    factors[i] = floor ? mx::Floor::factor(bytes[i]) : mx::Rceil::factor(bytes[i]);
  }
}
extern "C" float mx_value(uint32_t byte) { return mx::e8m0_to_float(byte); }
extern "C" int64_t mx_swizzled_offset(int64_t row, int64_t col, int64_t cols) { return mx::swizzled_offset(row, col, cols); }

// The group of a row of tiles: its first row, how many it has, whether they have scales.
extern "C" void mx_tile_row(const int32_t* offs, int groups, int64_t rows, int64_t tile_row, int64_t* found) {
  struct Arguments {
    const int32_t* offs;
    int groups;
    int64_t rows, tile_row, *found;
  } arguments{offs, groups, rows, tile_row, found};
  cuda_on_cpu::run_block(kSwizzledThreads, [](void* given) {
    const Arguments& a = *static_cast<Arguments*>(given);
    const TileRow at = tile_row_of(a.offs, a.groups, a.rows, a.tile_row);
    if (threadIdx.x == 77) a.found[0] = at.first_row, a.found[1] = at.rows, a.found[2] = at.scaled;
  }, &arguments);
}
