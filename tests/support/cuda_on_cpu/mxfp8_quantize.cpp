// mxfp8_quantize's kernels behind a C function, for tests/kernels/test_mxfp8_quantize.py.
#include <functional>

#include "inductor_ext/quantize_blocks.cuh"
#include "mxfp8_quantize/mxfp8_quantize.cuh"

#include "entry.h"

namespace {

template <typename In, typename Rounding>
void run(const Given& x, const Given* offs, const Given& data, const Given& scales, bool swizzled) {
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
  return attempt(error, length, [&] {
    if (bits == 32) run<float>(*x, offs, *data, *scales, swizzled, floor);
    if (bits == 16) run<__half>(*x, offs, *data, *scales, swizzled, floor);
    if (bits == -16) run<__nv_bfloat16>(*x, offs, *data, *scales, swizzled, floor);
  });
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

// Where rows have their scales, 256 of them from `first` on: row of tiles, negative for none, and row of the tile.
extern "C" void mx_tile_rows(const int32_t* offs, int groups, int64_t rows, int64_t first, int64_t* found) {
  struct Arguments {
    const int32_t* offs;
    int groups;
    int64_t rows, first, *found;
  } arguments{offs, groups, rows, first, found};
  cuda_on_cpu::run_block(kMxThreads, [](void* given) {
    static GroupTable table;
    const Arguments& a = *static_cast<Arguments*>(given);
    const GroupEnds ends = group_ends(a.offs, a.groups, a.rows, threadIdx.x);
    const int row = static_cast<int>(a.first + threadIdx.x);
    const RowGroup at = group_of(table, a.offs, a.groups, a.rows, row, ends);
    const bool scaled = at.tile_row >= 0;
    a.found[2 * threadIdx.x] = scaled ? at.tile_row + (row - at.begin) / mx::kTileRows : -1;
    a.found[2 * threadIdx.x + 1] = scaled ? (row - at.begin) % mx::kTileRows : 0;
  }, &arguments);
}

// Rows held in registers, as the kernels do that compute what they quantise: `threads` a row, 8 or 32 of a block of 64, or all of one.
struct RowsParams {
  const void* x;
  uint8_t *data, *scales;
  int64_t rows, cols;  // in vectors
  int threads;
};
template <typename In, int E, int U>
void rows_kernel(RowsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.threads) + threadIdx.x / p.threads;
  const int lane = threadIdx.x % p.threads;
  Raw<In, E> y[U];
  for (int u = 0; u < U; ++u) {
    const int i = u * p.threads + lane;
    y[u].zero();
    if (row < p.rows && i < p.cols) y[u].load(static_cast<const In*>(p.x) + (row * p.cols + i) * E);
  }
  quantize_blocks(y, row < p.rows, lane, p.threads, p.cols, MxScale<mx::Rceil>{}, p.scales + row * (p.cols * E / mx::kBlock),
                  p.data + row * p.cols * E);
}
template <typename In>
void run_rows(RowsParams p, int64_t bytes) {
  spans = {{static_cast<const char*>(p.x), static_cast<const char*>(p.x) + bytes * sizeof(In)},
           {reinterpret_cast<const char*>(p.data), reinterpret_cast<const char*>(p.data) + bytes}};
  const bool vectors = p.threads != 96;
  if (vectors) p.cols /= 8;
  const unsigned threads = vectors ? 64 : 96, blocks = static_cast<unsigned>(ceil_div(p.rows, threads / p.threads));
  if (vectors) return cuda_on_cpu::run_grid(blocks, threads, rows_kernel<In, 8, 3>, p);
  cuda_on_cpu::run_grid(blocks, threads, rows_kernel<In, 1, 5>, p);
}
extern "C" void mx_rows(int bits, const void* x, uint8_t* data, uint8_t* scales, int64_t rows, int64_t cols, int threads) {
  const RowsParams p{x, data, scales, rows, cols, threads};
  if (bits == 32) run_rows<float>(p, rows * cols);
  if (bits == 16) run_rows<__half>(p, rows * cols);
  if (bits == -16) run_rows<__nv_bfloat16>(p, rows * cols);
}
