// Columns as they are beside an activation, gated or not, and FP8 with a dynamic scale a row, in one pass over memory.
//
//   y = [x, form(gate, up)], or [form(gate, up), x];  scale = scale_program(max |y|);  out = cast(program(y, scale))
//
//   gate, up as act_quantize.cuh has them, with C1 columns of y
//   x [R, C0], or heads [R, H, D] that lie side by side in y, C0 = H * D: unit last stride, any pitch between heads, and rows with
//   one pitch or two (attention's [B, H, S, D] seen as [B, S, H, D], without a copy)
//   out [R, C0 + C1] contiguous, scale R elements, MXFP8 (MxScale): [R, (C0 + C1) / 32]; C0 + C1 up to 32 768
//   c0..c7 are the constants of both programs
//
// Whether x or the activation comes first is not compiled in: which of the two a vector is from is one comparison.
#pragma once

#include "act_quantize/act_quantize.cuh"

namespace inductor_ext {

struct ActCatParams : ActQuantizeParams {  // cols are those of y
  const void* x;
  int64_t sample_pitch, row_pitch, head_pitch;
  bool several_samples;
  Divisor sample;  // its rows
  // In vectors, as cols: a head, where y has x and the activation, and how many of the activation.
  Divisor head;
  int x_begin, act_begin, act_cols;
};

// x's part of one row of y.
template <typename In>
struct CopiedRow {
  const In* start;

  __device__ __forceinline__ CopiedRow(const ActCatParams& p, int64_t row) {
    int64_t offset = row * p.row_pitch;
    if (p.several_samples) {
      uint32_t left;
      const int64_t sample = p.sample.divide(static_cast<uint32_t>(row), &left);
      offset = sample * p.sample_pitch + left * p.row_pitch;
    }
    start = static_cast<const In*>(p.x) + offset;
  }
  template <int E>
  __device__ __forceinline__ void load(const ActCatParams& p, int i, Raw<In, E>& y) const {
    uint32_t left;
    const int64_t head = p.head.divide(static_cast<uint32_t>(i), &left);
    y.load(start + head * p.head_pitch + left * E);
  }
};

// Whether vector i of a row of y is the activation's.
__device__ __forceinline__ bool activated(const ActCatParams& p, int i) {
  return static_cast<unsigned>(i - p.act_begin) < static_cast<unsigned>(p.act_cols);
}

// What a row of y is made of. `up` has one vector where there is none.
template <bool kWhole, typename Row, int Threads, int E, int U, int N>
__device__ __forceinline__ void load_row(const ActCatParams& p, const RowPlace<Threads>& place, Raw<typename Row::In, E> (&y)[U],
                                         Raw<typename Row::In, E> (&up)[N]) {
  const CopiedRow<typename Row::In> copied(p, place.row);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = u * place.threads + place.lane;
    auto& other = up[N == 1 ? 0 : u];
    y[u].zero(), other.zero();
    if (has_vector<kWhole>(place, u, static_cast<int>(p.cols))) {
      if (activated(p, i)) {
        Row::load(p, place.row, i - p.act_begin, y[u], other);
      } else {
        copied.load(p, i - p.x_begin, y[u]);
      }
    }
  }
}

template <typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E, int U>
__global__ void __launch_bounds__(Threads == kWholeBlock ? 1024 : kRowsBlock)
    act_cat_quantize_kernel(const __grid_constant__ ActCatParams p) {
  using In = typename Row::In;
  __shared__ uint32_t shared[32];
  const auto place = RowPlace<Threads>::of(p.rows, blockIdx.x);
  Raw<In, E> y[U], up[U];
  wait_for_previous_kernel();
  load_row<false, Row>(p, place, y, up);
  allow_next_kernel();
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (activated(p, u * place.threads + place.lane)) {  // all of a warp or none, but for one warp of a row
      Raw<In, E> gate[1] = {y[u]}, factor[1] = {up[u]};
      Row::activate(gate, factor);
      y[u] = gate[0];
    }
  }
  quantize_row<Threads, Fp8, Saturated, ScaleT, ScaleProgram, Chain>(
      y, place, p.consts, shared, p.cols, static_cast<ScaleT*>(p.scale) + place.row * scales_of_row<ScaleProgram>(p.cols * E),
      p.out + place.row * p.cols * E);
}

template <bool kWhole, typename Row, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Chain, int Threads, int E,
          int U>
__global__ void __launch_bounds__(1024) act_cat_quantize_walk_kernel(const __grid_constant__ ActCatParams p) {
  walk_rows<kWhole, Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>(
      p, [&](const RowPlace<Threads>& place, auto& y, auto& up) { load_row<kWhole, Row>(p, place, y, up); },
      [&](const RowPlace<Threads>& place, int u) { return activated(p, u * place.threads + place.lane); });
}

// Host: checks x, and puts where it lies into `p`, in elements. Gives its columns.
template <typename In>
int64_t take_columns(ActCatParams& p, int64_t* head, const TensorView& x, const TensorView& gate, int64_t rows, Device& device) {
  TensorMatcher().dtype<In>().device(device).verify(x, "x");
  const int leading = gate.ndim() - 1, last = x.ndim() - 1;
  bool alike = last == leading || last == leading + 1;
  for (int i = 0; i < leading && alike; ++i) alike = x.shape()[i] == gate.shape()[i];
  if (!alike) {
    TVM_FFI_THROW(ValueError) << "x: wanted the rows of gate, " << shape_of(gate) << ", and columns or heads, found shape " << shape_of(x);
  }
  *head = x.shape()[last];
  const int64_t heads = last == leading ? 1 : x.shape()[leading], columns = heads * *head;
  if (columns == 0) TVM_FFI_THROW(ValueError) << "x: wanted at least one column, found shape " << shape_of(x);
  if (rows == 0) return columns;

  // Leading dimensions merge into rows of a sample, and samples.
  int64_t sizes[2] = {1, 1}, pitches[2] = {0, 0};
  int level = 0;
  for (int i = leading - 1; i >= 0 && level < 2; --i) {
    const int64_t size = x.shape()[i], stride = x.strides()[i];
    if (size == 1) continue;
    if (sizes[level] != 1 && stride != pitches[level] * sizes[level] && ++level == 2) break;
    if (sizes[level] == 1) pitches[level] = stride;
    sizes[level] *= size;
  }
  if (level == 2 || (*head != 1 && x.strides()[last] != 1)) {
    TVM_FFI_THROW(ValueError) << "x: wanted rows with unit stride and at most two strides between them, found strides " << strides_of(x)
                              << " of shape " << shape_of(x);
  }
  if (sizes[1] > 1 && rows > INT32_MAX) TVM_FFI_THROW(ValueError) << "x: wanted fewer than 2^31 rows, found shape " << shape_of(x);
  p.x = data(x), p.row_pitch = pitches[0], p.sample_pitch = pitches[1], p.several_samples = sizes[1] > 1;
  p.head_pitch = heads == 1 ? 0 : x.strides()[leading];
  if (p.several_samples) p.sample = Divisor::of(sizes[0]);
  return columns;
}

template <typename Row, bool Rowwise, typename Fp8, bool Saturated, typename ScaleT, typename ScaleProgram, typename Program>
struct ActCatQuantize {
  static_assert(Rowwise, "a scale for each row or block");
  static_assert(!Program::kRow && !ScaleProgram::kRow, "act_cat_quantize has no operands of a value a row for its programs");
  using Chain = ToFp8<Program>;
  using In = typename Row::In;

  // The two that are nothing are what ops with one scale for a tensor are given.
  static void run(TensorView x, TensorView gate, Optional<TensorView> up, bool x_first, TensorView out, TensorView scale, Optional<TensorView>,
                  Optional<TensorView>, Optional<TensorView> bound, double c0, double c1, double c2, double c3, double c4, double c5, double c6,
                  double c7) {
    Device device;
    ActCatParams p{};
    const Rows rows = take_inputs<Row, Fp8>(p, gate, up, out, device);
    int64_t head;
    const int64_t copied = take_columns<In>(p, &head, x, gate, rows.rows, device), columns = copied + rows.cols;
    if (columns > 32768) TVM_FFI_THROW(ValueError) << "x, gate: wanted at most 32768 columns in all, found " << columns;
    TensorMatcher().dtype<ScaleT>().contiguous().device(device).verify(scale, "scale");
    if (kIsMx<ScaleProgram> && columns % mx::kBlock != 0) {
      TVM_FFI_THROW(ValueError) << "x, gate: wanted rows of a multiple of " << mx::kBlock << " elements, found " << columns;
    }
    if (out.numel() != rows.rows * columns || scale.numel() != rows.rows * scales_of_row<ScaleProgram>(columns)) {
      TVM_FFI_THROW(ValueError) << "out, scale: wanted " << rows.rows << " rows of " << columns << ", found shapes " << shape_of(out) << ", "
                                << shape_of(scale);
    }
    if (rows.rows == 0) return;

    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.scale = data(scale), p.consts = Consts::of(constants, take_bound<ScaleProgram, Program>(bound, device));
    const bool vectors = inputs_in_vectors<Row>(p) && copied_in_vectors(p, head);
    const int64_t each = vectors ? 8 : 1;
    p.head = Divisor::of(head / each), p.act_cols = static_cast<int>(rows.cols / each), p.cols = columns / each;
    p.x_begin = x_first ? 0 : p.act_cols, p.act_begin = x_first ? static_cast<int>(copied / each) : 0;
    DeviceGuard guard(device.id());
    with_row_shape(rows.rows, columns, vectors, sm_count(device.id()), Start{p, env_stream(device.id()), device.id()});
  }

 private:
  static bool copied_in_vectors(const ActCatParams& p, int64_t head) {
    const auto whole = [](int64_t pitch) { return pitch * sizeof(In) % 16 == 0; };
    return head % 8 == 0 && aligned(p.x, 16) && whole(p.sample_pitch) && whole(p.row_pitch) && whole(p.head_pitch);
  }
  struct Start {
    ActCatParams& p;
    cudaStream_t stream;
    int device;
    template <int Threads, int E, int U>
    void operator()(unsigned grid, unsigned block) const {
      if constexpr (kWalks<Row, E, U>) {
        constexpr int kOf = Threads == kWholeBlock ? kPartOfBlock : Threads;
        auto* whole = act_cat_quantize_walk_kernel<true, Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, kOf, E, U>;
        auto* parts = act_cat_quantize_walk_kernel<false, Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, kOf, E, U>;
        const int threads = Threads == kWholeBlock ? static_cast<int>(block) : Threads;
        if (walk<U>(whole, parts, p, p.cols * E, threads, stream, device)) return;
      }
      auto* kernel = act_cat_quantize_kernel<Row, Fp8, Saturated, ScaleT, ScaleProgram, Chain, Threads, E, U>;
      Launch(grid, block).stream(stream).programmatic().run(kernel, p);
    }
  };
};

}  // namespace inductor_ext
