// out = cast(program(x)): an element-wise chain ending in FP8, one pass over memory.
//
//   x    float, __half or __nv_bfloat16, any shape        out   the same shape, FP8
//   s0..s3  the program's tensor operands: one element, or one element a row of x's last dimension     c0..c7  its constants
//
// Where x and out are dense alike (any permutation) they are one run of elements; otherwise rows with a pitch each. 8 elements a
// load: one 16-byte load and one 8-byte store of a 16-bit x, 2 or 4 of them in flight a thread. Rows that 16-byte accesses cannot
// reach (an odd width or pitch, an odd base) go element by element.
#pragma once

#include <tvm/ffi/function.h>

#include <algorithm>

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

struct Fp8DowncastParams {
  const void* x;
  uint8_t* out;
  int64_t rows;       // 1 where everything is one run of elements
  int64_t cols;       // vectors of a row
  int64_t tail;       // elements behind the last vector (one run only)
  int64_t x_pitch;    // elements
  int64_t out_pitch;  // bytes
  Consts consts;
  Operands operands;
};

// One run of elements: E elements a vector, U vectors a thread.
constexpr int kRunThreads = 256;
constexpr int kRunUnroll = 2;

template <typename In, typename Fp8, bool Saturated, typename Chain, int E, int U>
__global__ void __launch_bounds__(kRunThreads) fp8_downcast_run_kernel(const __grid_constant__ Fp8DowncastParams p) {
  const In* x = static_cast<const In*>(p.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kRunThreads * U) + threadIdx.x;
  Raw<In, E> raw[U];
  wait_for_previous_kernel();
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t i = first + u * kRunThreads;
    if (i < p.cols) raw[u].load(x + i * E);
  }
  allow_next_kernel();
  const auto prepared = Chain::prepare(Env{p.consts, p.operands.pointer});
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t i = first + u * kRunThreads;
    if (i < p.cols) downcast_vector<In, Fp8, Saturated, Chain>(raw[u], prepared, p.out + i * E);
  }
  if (E > 1 && blockIdx.x == gridDim.x - 1 && threadIdx.x < p.tail) {
    const int64_t i = p.cols * E + threadIdx.x;
    Raw<In, 1> one;
    one.load(x + i);
    downcast_vector<In, Fp8, Saturated, Chain>(one, prepared, p.out + i);
  }
}

// Rows: `Lanes` lanes take one row, U vectors at a time; the pieces of a long row go to the blocks of grid.y.
constexpr int kRowThreads = 128;

template <typename In, typename Fp8, bool Saturated, typename Chain, int Lanes, int E, int U>
__global__ void __launch_bounds__(kRowThreads) fp8_downcast_rows_kernel(const __grid_constant__ Fp8DowncastParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / Lanes) + threadIdx.x / Lanes;
  if (row >= p.rows) return;
  const In* x = static_cast<const In*>(p.x) + row * p.x_pitch;
  uint8_t* out = p.out + row * p.out_pitch;
  const int cols = static_cast<int>(p.cols);
  int first = blockIdx.y * (Lanes * U) + threadIdx.x % Lanes;
  Raw<In, E> raw[U];
  auto load = [&] {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * Lanes < cols) raw[u].load(x + (first + u * Lanes) * E);
    }
  };
  wait_for_previous_kernel();
  load();
  allow_next_kernel();
  Env env{p.consts, p.operands.pointer};
  env.row = row;
  const auto prepared = Chain::prepare(env);
  while (true) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = first + u * Lanes;
      if (i < cols) downcast_vector<In, Fp8, Saturated, Chain>(raw[u], prepared, out + i * E);
    }
    first += gridDim.y * (Lanes * U);
    if (first >= cols) return;
    load();
  }
}

template <typename In, typename Fp8, bool Saturated, typename Program>
struct Fp8Downcast {
  using Chain = ToFp8<Program>;
  static constexpr int kVector = 8;

  static void run(TensorView x, TensorView out, Optional<TensorView> s0, Optional<TensorView> s1, Optional<TensorView> s2,
                  Optional<TensorView> s3, double c0, double c1, double c2, double c3, double c4, double c5, double c6,
                  double c7) {
    Device device;
    TensorMatcher().dtype<In>().device(device).verify(x, "x");
    TensorMatcher().dtype<Fp8>().device(device).verify(out, "out");

    PairRows shape;
    if constexpr (Program::kRow) {  // rows are those of the last dimension, in order
      Rows x_rows = rows_of(x, "x"), out_rows = rows_of(out, "out");
      if (x_rows.rows != out_rows.rows || x_rows.cols != out_rows.cols) {
        TVM_FFI_THROW(ValueError) << "out: wanted the shape of x, " << shape_of(x) << ", found " << shape_of(out);
      }
      shape = {x_rows.rows, x_rows.cols, x_rows.pitch, out_rows.pitch};
    } else {
      shape = pair_rows(x, "x", out, "out");
    }

    Fp8DowncastParams p;
    const Optional<TensorView>* given[kMaxOperands] = {&s0, &s1, &s2, &s3};
    for (const void*& pointer : p.operands.pointer) pointer = nullptr;
    VisitOperands<Program>::with([&](int index, bool is_row, auto type) {
      static constexpr const char* kNames[kMaxOperands] = {"s0", "s1", "s2", "s3"};
      if (!given[index]->has_value()) TVM_FFI_THROW(ValueError) << kNames[index] << ": wanted a tensor, found None";
      const TensorView& operand = given[index]->value();
      TensorMatcher().template dtype<decltype(type)>().contiguous().device(device).verify(operand, kNames[index]);
      const int64_t wanted = is_row ? shape.rows : 1;
      if (operand.numel() != wanted) {
        TVM_FFI_THROW(ValueError) << kNames[index] << ": wanted " << wanted << " elements, found shape " << shape_of(operand);
      }
      p.operands.pointer[index] = data(operand);
    });

    if (shape.rows == 0 || shape.cols == 0) return;
    p.x = data(x), p.out = data<uint8_t>(out);
    p.rows = shape.rows, p.cols = shape.cols, p.x_pitch = shape.a_pitch, p.out_pitch = shape.b_pitch, p.tail = 0;
    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.consts = Consts::of(constants);

    DeviceGuard guard(device.id());
    const bool vectors = aligned(p.x, 16) && aligned(p.out, kVector);
    if constexpr (!Program::kRow) {
      if (p.rows == 1) return vectors ? launch_run<kVector>(p, device.id()) : launch_run<1>(p, device.id());
    }
    check_row_length(p.cols, "x");
    if (vectors && p.cols % kVector == 0 && p.x_pitch * sizeof(In) % 16 == 0 && p.out_pitch % kVector == 0) {
      p.cols / kVector <= 16 ? launch_rows<8, kVector, 2>(p, device.id()) : launch_rows<32, kVector, 4>(p, device.id());
    } else {
      launch_rows<32, 1, 8>(p, device.id());
    }
  }

 private:
  // Few vectors: one a thread, so that they spread over the multiprocessors. Many: several loads in flight a thread.
  template <int E>
  static void launch_run(Fp8DowncastParams& p, int device) {
    p.tail = p.cols % E;
    p.cols /= E;
    if (p.cols <= int64_t{4} * kRunThreads * sm_count(device)) {
      launch(fp8_downcast_run_kernel<In, Fp8, Saturated, Chain, E, 1>, p, p.cols, kRunThreads, 1, kRunThreads, device);
    } else {
      launch(fp8_downcast_run_kernel<In, Fp8, Saturated, Chain, E, kRunUnroll>, p, p.cols, kRunThreads * kRunUnroll, 1, kRunThreads, device);
    }
  }
  template <int Lanes, int E, int U>
  static void launch_rows(Fp8DowncastParams& p, int device) {
    p.cols /= E;
    const int64_t pieces = std::min<int64_t>(ceil_div(p.cols, Lanes * U), 65535);
    launch(fp8_downcast_rows_kernel<In, Fp8, Saturated, Chain, Lanes, E, U>, p, p.rows, kRowThreads / Lanes, pieces, kRowThreads, device);
  }
  static void launch(void (*kernel)(Fp8DowncastParams), const Fp8DowncastParams& p, int64_t work, int work_a_block, int64_t pieces,
                     int threads, int device) {
    const dim3 grid(static_cast<unsigned>(std::max<int64_t>(ceil_div(work, work_a_block), 1)), static_cast<unsigned>(pieces));
    Launch(grid, threads).stream(env_stream(device)).programmatic().run(kernel, p);
  }
};

}  // namespace inductor_ext
