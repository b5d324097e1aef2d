// Tokens in MXFP8 as bf16, for the kernels of compute capability 9.0, which has no tensor core for MX.
//
//   out[t, k] = x[t, k] * 2^(scale[t, k / 32] - 127)        exact, see `hopper.cuh`
//
// A launch of its own: every tile of weights reads its tokens again, and converting them there each time took as long as the
// products themselves (H200, 8 192 x 4096 tokens by 8 experts: 5.8 ms, 3.8 with bf16 tokens). Here it is one pass over memory.
#pragma once

#include <algorithm>

#include "inductor_ext/launch.cuh"
#include "inductor_ext/tensor.h"
#include "mxfp8_grouped_mm/hopper_layout.cuh"
#include "mxfp8_grouped_mm/hopper_math.cuh"

namespace inductor_ext {

struct ToBf16Params {
  const uint8_t* x;
  const uint8_t* scale;  // contiguous
  uint4* out;            // contiguous
  int64_t pitch;         // bytes of a row of x
  int64_t pieces;        // of 16 elements, in all
  int per_row;           // pieces
};

constexpr int kToBf16Threads = 256, kToBf16Unroll = 4;

// A thread has four pieces of 16 elements, 64 bytes on their way; neighbouring threads have neighbouring pieces.
inline __global__ void __launch_bounds__(kToBf16Threads) mxfp8_to_bf16_kernel(const __grid_constant__ ToBf16Params p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kToBf16Threads * kToBf16Unroll) + threadIdx.x;
  uint4 raw[kToBf16Unroll];
  uint8_t scale[kToBf16Unroll];
  wait_for_previous_kernel();
#pragma unroll
  for (int u = 0; u < kToBf16Unroll; ++u) {
    const int64_t at = first + u * kToBf16Threads;
    if (at >= p.pieces) continue;
    const int64_t row = at / p.per_row;
    raw[u] = *reinterpret_cast<const uint4*>(p.x + row * p.pitch + (at - row * p.per_row) * 16);
    scale[u] = p.scale[at / 2];
  }
  allow_next_kernel();
#pragma unroll
  for (int u = 0; u < kToBf16Unroll; ++u) {
    const int64_t at = first + u * kToBf16Threads;
    if (at >= p.pieces) continue;
    const uint32_t factor = grouped::factor_of(scale[u]);
    const uint32_t words[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = words[2 * half], high = words[2 * half + 1];
      p.out[2 * at + half] = make_uint4(scaled_pair(low & 0xffff, factor), scaled_pair(low >> 16, factor),
                                        scaled_pair(high & 0xffff, factor), scaled_pair(high >> 16, factor));
    }
  }
}

struct Mxfp8ToBf16 {
  // x [T, K] e4m3, rows at multiples of 16 bytes; scale [T, K / 32]; out: 2 * T * K bytes at a multiple of 16.
  static void run(TensorView x, TensorView scale, TensorView out) {
    Symbol tokens("T"), k("K"), bytes("bytes");
    Device device;
    TensorMatcher({tokens, k}).dtype<__nv_fp8_e4m3>().strides({kAny, 1}).device(device).verify(x, "x");
    if (k.value() % grouped::kBlock != 0) TVM_FFI_THROW(ValueError) << "x: wanted K a multiple of 32, found shape " << shape_of(x);
    TensorMatcher({tokens, k.value() / grouped::kBlock}).dtype<__nv_fp8_e8m0, uint8_t>().contiguous().device(device).verify(scale, "x_scale");
    TensorMatcher({bytes}).dtype<uint8_t>().contiguous().device(device).verify(out, "scratch");
    const int64_t pitch = tokens.value() == 1 ? k.value() : x.strides()[0];
    if (pitch % 16 != 0 || !aligned(data(x), 16)) {
      TVM_FFI_THROW(ValueError) << "x: wanted rows that start at multiples of 16 bytes, found strides " << strides_of(x);
    }
    if (bytes.value() < 2 * tokens.value() * k.value() || !aligned(data(out), 16)) {
      TVM_FFI_THROW(ValueError) << "scratch: wanted " << 2 * tokens.value() * k.value() << " bytes at a multiple of 16, found " << bytes.value();
    }
    if (tokens.value() == 0 || k.value() == 0) return;
    ToBf16Params p;
    p.x = data<uint8_t>(x), p.scale = data<uint8_t>(scale), p.out = static_cast<uint4*>(data(out));
    p.pitch = pitch, p.per_row = static_cast<int>(k.value() / 16), p.pieces = tokens.value() * p.per_row;
    DeviceGuard guard(device.id());
    Launch launch(static_cast<unsigned>(ceil_div(p.pieces, kToBf16Threads * kToBf16Unroll)), kToBf16Threads);
    launch.stream(env_stream(device.id())).programmatic();
    launch.run(mxfp8_to_bf16_kernel, p);
  }
};

}  // namespace inductor_ext
