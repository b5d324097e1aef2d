// Host side of the FP8 matrix products: argument checks, the copy engine's tensor maps, and the products of one launch.
//
//   a_i [M, K_i] row-major, b_i [K_i, N_i] column-major, out [M, ΣN_i] with any row stride; see op.py for dtypes and scales.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>

#include <algorithm>
#include <functional>

#include "inductor_ext/launch.cuh"
#include "inductor_ext/tensor.h"
#include "inductor_ext/tensor_map.cuh"
#include "scaled_mm/ends.cuh"

namespace inductor_ext {

using tvm::ffi::Array;
using tvm::ffi::Tensor;

constexpr int kMaxProducts = 4;
constexpr int64_t kAlignment = 16;  // bytes, of everything that the copy engine touches

// One product of a launch, as the device sees it. A scale of one element is read with stride 0.
struct Product {
  CUtensorMap a, b;
  CUtensorMap out;  // of the tile family only
  CUtensorMap residual;  // of kernels that add one only
  const float* scale_a;
  const float* scale_b;
  const void* bias;
  int scale_a_stride, scale_b_stride;
  int n, k;
  int column;      // of the output, where this product begins
  int first_tile;  // how many tiles of output channels the products before it have
};

struct Products {
  Product of[kMaxProducts];
  int count;
  int m;
  int tiles_n;  // tiles of output channels of all products
  void* out;
  int64_t out_pitch;  // elements
};

// What a kernel family wants of the tensor maps: rows of a and b that one copy brings, and the box that one store takes.
struct Boxes {
  int a_rows, b_rows;
  int tile_n;           // output channels a tile
  int out_rows, out_columns;  // 0: no map of the output
  int tiles_together = 1;     // of output channels, that no two products may share
};

// Elements from one row to the next; a single row has no neighbour, and its stride may be anything.
inline int64_t pitch_of(const TensorView& view, int dim, int64_t size, int64_t length) {
  return size == 1 ? ceil_div(length, kAlignment) * kAlignment : view.strides()[dim];
}

inline void check_pitch(const TensorView& view, const char* name, int64_t pitch_bytes) {
  if (pitch_bytes % kAlignment != 0 || !aligned(data(view), kAlignment)) {
    TVM_FFI_THROW(ValueError) << name << ": wanted rows that start at multiples of " << kAlignment << " bytes, found strides "
                              << strides_of(view) << " at address ..." << reinterpret_cast<uintptr_t>(data(view)) % kAlignment;
  }
}

// A scale of one element, or of `extent` elements one after the other: [extent], [extent, 1] or [1, extent].
inline int scale_stride(const TensorView& scale, const char* name, int64_t extent, Device& device) {
  TensorMatcher().dtype<float>().device(device).verify(scale, name);
  if (scale.numel() == 1) return 0;
  int64_t stride = 1;
  for (int i = 0; i < scale.ndim(); ++i) {
    if (scale.shape()[i] > 1) stride = scale.shape()[i] == extent ? scale.strides()[i] : -1;
  }
  if (scale.numel() != extent || stride < 0 || stride > (1 << 20)) {
    TVM_FFI_THROW(ValueError) << name << ": wanted one element or " << extent << " in one dimension, found shape " << shape_of(scale)
                              << " strides " << strides_of(scale);
  }
  return static_cast<int>(stride);
}

// Adds one product to a launch. Checks everything before anything is launched.
template <typename EA, typename EB, typename Out>
void add_product(Products& products, const Boxes& boxes, Device& device, int* column, const TensorView& a, const TensorView& b,
                 const TensorView& scale_a, const TensorView& scale_b, const Optional<TensorView>& bias, const TensorView& out,
                 const Optional<TensorView>& residual = std::nullopt) {
  if (products.count == kMaxProducts) TVM_FFI_THROW(ValueError) << "b: wanted at most " << kMaxProducts << " in one launch";
  Product& p = products.of[products.count++];
  Symbol k("K"), n("N");
  TensorMatcher({products.m, k}).dtype<EA>().strides({kAny, 1}).device(device).verify(a, "a");
  TensorMatcher({k, n}).dtype<EB>().strides({1, kAny}).device(device).verify(b, "b");
  if (k.value() % 16 != 0 || n.value() % 16 != 0 || k.value() == 0 || n.value() == 0) {
    TVM_FFI_THROW(ValueError) << "b: wanted both sizes to be multiples of 16, found shape " << shape_of(b);
  }
  p.n = static_cast<int>(n.value()), p.k = static_cast<int>(k.value());
  p.column = *column, p.first_tile = products.tiles_n;
  *column += p.n;
  products.tiles_n += static_cast<int>(ceil_div(p.n, boxes.tile_n * boxes.tiles_together)) * boxes.tiles_together;
  p.scale_a = data<float>(scale_a), p.scale_a_stride = scale_stride(scale_a, "scale_a", products.m, device);
  p.scale_b = data<float>(scale_b), p.scale_b_stride = scale_stride(scale_b, "scale_b", p.n, device);
  p.bias = nullptr;
  if (bias.has_value()) {
    TensorMatcher().dtype<Out>().contiguous().device(device).verify(*bias, "bias");
    const TensorView added = *bias;
    if (added.numel() != p.n) TVM_FFI_THROW(ValueError) << "bias: wanted " << p.n << " elements, found shape " << shape_of(added);
    p.bias = data(added);
  }
  if (residual.has_value()) {
    TensorMatcher({products.m, n}).dtype<Out>().strides({kAny, 1}).device(device).verify(*residual, "residual");
  }
  if (products.m == 0) return;
  const int64_t a_pitch = pitch_of(a, 0, products.m, p.k), b_pitch = pitch_of(b, 1, p.n, p.k);
  check_pitch(a, "a", a_pitch), check_pitch(b, "b", b_pitch);
  encode(&p.a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data(a), products.m, p.k, a_pitch, boxes.a_rows, 128);
  encode(&p.b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data(b), p.n, p.k, b_pitch, boxes.b_rows, 128);
  if (boxes.out_rows > 0) {
    const Out* first = data<Out>(out) + p.column;
    encode(&p.out, MapType<Out>::value, sizeof(Out), first, products.m, p.n, products.out_pitch * sizeof(Out), boxes.out_rows,
           boxes.out_columns);
  }
  if (residual.has_value()) {
    const int64_t pitch = pitch_of(*residual, 0, products.m, p.n) * static_cast<int64_t>(sizeof(Out));
    check_pitch(*residual, "residual", pitch);
    encode(&p.residual, MapType<Out>::value, sizeof(Out), data<Out>(*residual), products.m, p.n, pitch, boxes.out_rows, boxes.out_columns);
  }
}

template <typename Out>
Products begin_products(const TensorView& a, const TensorView& out, Device& device) {
  Products products;
  products.count = 0, products.tiles_n = 0;
  Symbol m("M"), n("N");
  TensorMatcher({m, kAny}).device(device).verify(a, "a");
  TensorMatcher({m, n}).dtype<Out>().strides({kAny, 1}).device(device).verify(out, "out");
  if (m.value() > (int64_t{1} << 30)) TVM_FFI_THROW(ValueError) << "a: wanted at most 2^30 rows, found " << m.value();
  products.m = static_cast<int>(m.value());
  products.out = data(out);
  products.out_pitch = m.value() == 1 ? ceil_div(n.value(), 16) * 16 : out.strides()[0];
  if (products.m > 0) check_pitch(out, "out", products.out_pitch * sizeof(Out));
  return products;
}

inline void check_columns(const TensorView& out, int columns) {
  if (out.shape()[1] != columns) {
    TVM_FFI_THROW(ValueError) << "out: wanted " << columns << " columns, as b has together, found shape " << shape_of(out);
  }
}

// The entries of the families: `run` and `run_group` where products are only stored (Family::kStores), the others where more is
// done with them (Family::End). Family::launch(products, device, static_b, first, second) does the rest.
template <typename Family, typename EA, typename EB, typename Out>
struct ScaledMmEntries {
  static void run(TensorView a, TensorView b, TensorView scale_a, TensorView scale_b, Optional<TensorView> bias, TensorView out,
                  bool static_b, int64_t first, int64_t second) {
    static_assert(Family::kStores);
    Device device;
    const Boxes boxes = Family::boxes(first, second);
    Products products = begin_products<Out>(a, out, device);
    int column = 0;
    add_product<EA, EB, Out>(products, boxes, device, &column, a, b, scale_a, scale_b, bias, out);
    check_columns(out, column);
    start(products, device, static_b, first, second);
  }

  // out = the product, rounded, + residual [M, N]: of families that add.
  static void run_add(TensorView a, TensorView b, TensorView scale_a, TensorView scale_b, Optional<TensorView> bias,
                      TensorView residual, TensorView out, bool static_b, int64_t first, int64_t second) {
    static_assert(Family::End::kAdds);
    Device device;
    const Boxes boxes = Family::boxes(first, second);
    Products products = begin_products<Out>(a, out, device);
    int column = 0;
    add_product<EA, EB, Out>(products, boxes, device, &column, a, b, scale_a, scale_b, bias, out, residual);
    check_columns(out, column);
    start(products, device, static_b, first, second);
  }

  // out = act(gate's product) * up's, both [M, N], each step rounded.
  static void run_act_mul(TensorView a, TensorView gate, TensorView up, TensorView scale_a, TensorView scale_gate, TensorView scale_up,
                          Optional<TensorView> bias_gate, Optional<TensorView> bias_up, TensorView out, bool static_b, int64_t first,
                          int64_t second) {
    static_assert(Family::End::kGates);
    Symbol k("K"), n("N"), pitch("stride");
    Device device;
    TensorMatcher({k, n}).strides({1, pitch}).device(device).verify(gate, "gate");
    TensorMatcher({k, n}).strides({1, pitch}).device(device).verify(up, "up");
    const Boxes boxes = Family::boxes(first, second);
    Products products = begin_products<Out>(a, out, device);
    const bool gate_second = std::less<const void*>()(data(up), data(gate));
    int column = 0;
    const auto add = [&](bool is_gate) {
      column = 0;  // both end in the same place
      add_product<EA, EB, Out>(products, boxes, device, &column, a, is_gate ? gate : up, scale_a, is_gate ? scale_gate : scale_up,
                               is_gate ? bias_gate : bias_up, out);
    };
    add(!gate_second), add(gate_second);
    check_columns(out, column);
    if (products.m == 0) return;
    const uint8_t* weights[2] = {data<uint8_t>(gate), data<uint8_t>(up)};
    const int64_t distance = weights[!gate_second] - weights[gate_second];
    if (distance == 0 || distance >= int64_t{1} << 40) {
      TVM_FFI_THROW(ValueError) << "up: wanted another tensor than gate, less than 2^40 bytes away, found " << distance << " bytes";
    }
    const Product& p = products.of[0];
    encode<3>(&products.of[0].b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, weights[gate_second], {p.k, p.n, 2},
              {pitch_of(gate, 1, p.n, p.k), distance}, {128, boxes.b_rows, first == 1 ? 2 : 1});
    DeviceGuard guard(device.id());
    Family::launch(products, device.id(), static_b, static_cast<int>(first), static_cast<int>(second), {gate_second});
  }

  // Products of one a, side by side; the first `rotated` of them are heads of q (and k). cos and sin [1 or sequences, S, 128], and
  // row t is position t % S of sequence t / S. Weights [128], or None without a norm.
  static void run_rope(TensorView a, Array<Tensor> b, TensorView scale_a, Array<Tensor> scale_b, Optional<TensorView> q_weight,
                       Optional<TensorView> k_weight, TensorView cos, TensorView sin, int64_t rotated, double eps, TensorView out,
                       bool static_b, int64_t first, int64_t second) {
    using End = typename Family::End;
    static_assert(End::kRotates);
    const int64_t count = static_cast<int64_t>(b.size());
    if (count == 0 || static_cast<int64_t>(scale_b.size()) != count) {
      TVM_FFI_THROW(ValueError) << "scale_b: wanted as many as b, at least one, found " << scale_b.size() << " for " << count;
    }
    if (rotated < 1 || rotated > std::min<int64_t>(count, 2)) {
      TVM_FFI_THROW(ValueError) << "rotated: wanted 1 or 2, and no more than b has, found " << rotated << " of " << count;
    }
    Device device;
    const Boxes boxes = Family::boxes(first, second);
    Products products = begin_products<Out>(a, out, device);
    int column = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Tensor b_i = b[i], scale_b_i = scale_b[i];
      if (b_i.shape()[1] % kHead != 0) {
        TVM_FFI_THROW(ValueError) << "b: wanted a multiple of " << kHead << " columns, whole heads, found shape " << shape_of(TensorView(b_i));
      }
      add_product<EA, EB, Out>(products, boxes, device, &column, a, TensorView(b_i), scale_a, TensorView(scale_b_i), std::nullopt, out);
    }
    check_columns(out, column);

    RopeParams p{};
    const Optional<TensorView> weights[2] = {q_weight, k_weight};
    for (int64_t i = 0; i < 2; ++i) {
      const char* name = i == 0 ? "q_weight" : "k_weight";
      const bool wanted = End::kNorms && i < rotated;
      if (weights[i].has_value() != wanted) {
        TVM_FFI_THROW(ValueError) << name << ": wanted " << (wanted ? "a tensor, found None" : "None, found a tensor");
      }
      if (!wanted) continue;
      TensorMatcher({kHead}).dtype<Out>().contiguous().device(device).verify(*weights[i], name);
      p.weight[i] = data(*weights[i]);
    }
    Symbol tables("1 or B"), sequence("S");
    TensorMatcher({tables, sequence, kHead}).dtype<Out>().strides({kAny, kAny, 1}).device(device).verify(cos, "cos");
    TensorMatcher({tables, sequence, kHead}).dtype<Out>().strides({kAny, kAny, 1}).device(device).verify(sin, "sin");
    if (products.m == 0) return;
    const int64_t length = sequence.value(), sequences = length == 0 ? 0 : products.m / length;
    if (length == 0 || products.m % length != 0 || (tables.value() != 1 && tables.value() != sequences)) {
      TVM_FFI_THROW(ValueError) << "cos: wanted [1 or B, S, " << kHead << "] with B * S = " << products.m << ", the rows of a, found shape "
                                << shape_of(cos);
    }
    const auto place = [](const TensorView& table, const char* name, int64_t* batch, int64_t* token) {
      *batch = table.shape()[0] == 1 ? 0 : table.strides()[0], *token = table.shape()[1] == 1 ? 0 : table.strides()[1];
      if (!aligned(data(table), 16) || *batch * sizeof(Out) % 16 != 0 || *token * sizeof(Out) % 16 != 0) {
        TVM_FFI_THROW(ValueError) << name << ": wanted rows that start at multiples of 16 bytes, found strides " << strides_of(table)
                                  << " at address ..." << reinterpret_cast<uintptr_t>(data(table)) % 16;
      }
    };
    p.cos = data(cos), p.sin = data(sin);
    place(cos, "cos", &p.cos_batch, &p.cos_token), place(sin, "sin", &p.sin_batch, &p.sin_token);
    p.sequence = static_cast<uint32_t>(length), p.products = static_cast<int>(rotated), p.eps = static_cast<float>(eps);
    DeviceGuard guard(device.id());
    Family::launch(products, device.id(), static_b, static_cast<int>(first), static_cast<int>(second), p);
  }

  // `a` and `scale_a` have one element, shared, or as many as `b`.
  static void run_group(Array<Tensor> a, Array<Tensor> b, Array<Tensor> scale_a, Array<Tensor> scale_b,
                        Array<Optional<Tensor>> bias, TensorView out, bool static_b, int64_t first, int64_t second) {
    static_assert(Family::kStores);
    const size_t count = b.size();
    if (count == 0 || (a.size() != 1 && a.size() != count) || scale_a.size() != a.size() || scale_b.size() != count ||
        bias.size() != count) {
      TVM_FFI_THROW(ValueError) << "a, scale_a, scale_b, bias: wanted as many as b, " << count << " (a and scale_a may have one), "
                                << "found " << a.size() << ", " << scale_a.size() << ", " << scale_b.size() << ", " << bias.size();
    }
    Device device;
    const Boxes boxes = Family::boxes(first, second);
    const Tensor first_a = a[0];
    Products products = begin_products<Out>(TensorView(first_a), out, device);
    int column = 0;
    for (size_t i = 0; i < count; ++i) {
      const size_t shared = a.size() == 1 ? 0 : i;
      const Tensor a_i = a[shared], b_i = b[i], scale_a_i = scale_a[shared], scale_b_i = scale_b[i];
      const Optional<Tensor> bias_i = bias[i];
      Optional<TensorView> added;
      Tensor kept = a_i;
      if (bias_i.has_value()) kept = bias_i.value(), added = TensorView(kept);
      add_product<EA, EB, Out>(products, boxes, device, &column, TensorView(a_i), TensorView(b_i), TensorView(scale_a_i),
                               TensorView(scale_b_i), added, out);
    }
    check_columns(out, column);
    start(products, device, static_b, first, second);
  }

 private:
  static void start(const Products& products, const Device& device, bool static_b, int64_t first, int64_t second) {
    if (products.m == 0) return;
    DeviceGuard guard(device.id());
    Family::launch(products, device.id(), static_b, static_cast<int>(first), static_cast<int>(second));
  }
};

}  // namespace inductor_ext
