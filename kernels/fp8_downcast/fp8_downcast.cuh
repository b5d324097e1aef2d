// out = cast(program(x)): an element-wise chain ending in FP8, one pass over memory.
//
//   x    float, __half or __nv_bfloat16, any shape        out   the same shape, FP8
//   s0..s3  the program's tensor operands: one element, or one element a row of x's last dimension     c0..c7  its constants
//
// Where x and out are dense alike (any permutation) they are one run of elements; otherwise rows with a pitch each. 8 elements a
// load: one 16-byte load and one 8-byte store of a 16-bit x, 4 of them in flight a thread. Rows that 16-byte accesses cannot
// reach (an odd width or pitch, an odd base) go element by element.
#pragma once

#include <tvm/ffi/function.h>

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/steps.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

struct Fp8DowncastParams {
  const void* x;
  void* out;
  int64_t count;       // vectors in all
  int64_t tail;        // elements behind the last vector (one run of elements only)
  int64_t cols;        // vectors a row
  int64_t x_pitch;     // elements
  int64_t out_pitch;
  Consts consts;
  Operands operands;
};

constexpr int kFp8DowncastThreads = 256;

// E elements a vector, U vectors a thread. IsRows: vectors are addressed by row and column.
template <typename In, typename Fp8, bool Saturated, typename Program, int E, int U, bool IsRows>
__global__ void __launch_bounds__(kFp8DowncastThreads) fp8_downcast_kernel(const __grid_constant__ Fp8DowncastParams p) {
  const In* x = static_cast<const In*>(p.x);
  uint8_t* out = static_cast<uint8_t*>(p.out);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kFp8DowncastThreads * U) + threadIdx.x;

  Raw<In, E> raw[U];
  int64_t row[U], col[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t i = first + u * kFp8DowncastThreads;
    row[u] = 0, col[u] = i;
    if constexpr (IsRows) {
      // 32-bit division wherever it will do: the 64-bit one is a subroutine.
      row[u] = p.count >> 32 ? i / p.cols : static_cast<uint32_t>(i) / static_cast<uint32_t>(p.cols);
      col[u] = i - row[u] * p.cols;
    }
    if (i < p.count) raw[u].load(x + row[u] * p.x_pitch + col[u] * E);
  }

  Env env{p.consts, p.operands};
  typename Program::Prepared prepared;
  if constexpr (!Program::kRow) prepared = Program::prepare(env);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (first + u * kFp8DowncastThreads < p.count) {
      if constexpr (Program::kRow) {
        env.row = row[u];
        prepared = Program::prepare(env);
      }
      float v[E];
      raw[u].unpack(v);
      Program::apply(prepared, v);
      cast_fp8<Fp8, Saturated>(v).store(out + row[u] * p.out_pitch + col[u] * E);
    }
  }

  if constexpr (!IsRows && E > 1) {
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x < p.tail) {
      const int64_t i = p.count * E + threadIdx.x;
      Raw<In, 1> one;
      one.load(x + i);
      float v[1];
      one.unpack(v);
      Program::apply(prepared, v);
      cast_fp8<Fp8, Saturated>(v).store(out + i);
    }
  }
}

template <typename In, typename Fp8, bool Saturated, typename Program>
struct Fp8Downcast {
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
    p.x = data(x), p.out = data(out);
    p.x_pitch = shape.a_pitch, p.out_pitch = shape.b_pitch;
    const double constants[kMaxConsts] = {c0, c1, c2, c3, c4, c5, c6, c7};
    p.consts = Consts::of(constants);

    DeviceGuard guard(device.id());
    const bool one_run = !Program::kRow && shape.rows == 1;
    bool vectors = aligned(p.x, 16) && aligned(p.out, kVector);
    if (!one_run) {
      vectors = vectors && shape.cols % kVector == 0 && shape.a_pitch * sizeof(In) % 16 == 0 && shape.b_pitch % kVector == 0;
    }
    p.cols = vectors ? shape.cols / kVector : shape.cols;
    p.count = shape.rows * p.cols;
    p.tail = vectors && one_run ? shape.cols % kVector : 0;
    if (one_run) {
      vectors ? launch<kVector, false>(p, device.id()) : launch<1, false>(p, device.id());
    } else {
      vectors ? launch<kVector, true>(p, device.id()) : launch<1, true>(p, device.id());
    }
  }

 private:
  // Few vectors: one a thread, so that they spread over the multiprocessors. Many: four loads in flight a thread.
  template <int E, bool IsRows>
  static void launch(const Fp8DowncastParams& p, int device) {
    if constexpr (Program::kRow && !IsRows) {
      return;  // not reached: a row operand always goes by rows
    } else if (p.count <= int64_t{4} * kFp8DowncastThreads * sm_count(device)) {
      launch_unrolled<E, 1, IsRows>(p, device);
    } else {
      launch_unrolled<E, 4, IsRows>(p, device);
    }
  }
  template <int E, int U, bool IsRows>
  static void launch_unrolled(const Fp8DowncastParams& p, int device) {
    const int64_t blocks = ceil_div(p.count + (p.count == 0), kFp8DowncastThreads * U);
    Launch(static_cast<unsigned>(blocks), kFp8DowncastThreads)
        .stream(env_stream(device))
        .run(fp8_downcast_kernel<In, Fp8, Saturated, Program, E, U, IsRows>, p);
  }
};

}  // namespace inductor_ext
