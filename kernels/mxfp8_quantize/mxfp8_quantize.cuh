// MXFP8: e4m3 data and one e8m0 scale for every 32 elements of a row, in one pass over memory.
//
//   x       [T, K] or [E, N, K], float, __half or __nv_bfloat16; K a multiple of 32, unit last stride, other strides free
//   data    x's shape, e4m3, contiguous
//   scales  e8m0. Plain: x's shape with K / 32 columns. Swizzled (mx.cuh): [T, K] as one group, [E, N, K] as E groups, or with offs
//           [E] int32, cumulative ends, as groups of x's rows, in a buffer of T + 128 E rows
//
// All bytes of swizzled scales are written: those that pad are zero. Ends that are no ends (decreasing, or past T) give wrong
// scales, and no access outside the tensors.
//
// A warp takes 32 blocks at a time (mx.cuh: a warp's share): whole lines are read, and written but for an fp32 x's, and the
// scales of the share are one sector of 32 bytes that one store writes. Work is taken from the end backwards: what the kernel
// ahead wrote last is still in L2, and what this one writes last is what a product reads first.
#pragma once

#include <tvm/ffi/function.h>

#include <algorithm>

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/launch.cuh"
#include "inductor_ext/mx.cuh"
#include "inductor_ext/reduce.cuh"
#include "inductor_ext/tensor.h"

namespace inductor_ext {

struct Mxfp8QuantizeParams {
  const void* x;
  uint8_t* data;
  uint8_t* scales;
  int64_t groups, rows;        // x is [groups, rows, K]
  int64_t row_blocks;          // K / 32
  int64_t group_pitch, pitch;  // of x, in elements
  // swizzled
  const int32_t* offs;
  int offs_count;       // E, negative without offs
  int tiles;            // of a row of tiles
  int tiles_run;        // that a block of threads takes
  int64_t tile_rows;    // rows of tiles, of all groups
  int64_t scale_bytes;  // the buffer's size
};

// A share in registers: vector u is what access u gave.
template <typename In, typename Rounding, int E>
struct Mxfp8Share {
  static constexpr int kLanes = mx::kBlock / E;
  Raw<In, E> raw[kLanes];

  // Loads what `inside(block)`; `place(block)` is where x has the block.
  template <typename Inside, typename Place>
  __device__ __forceinline__ void load(int lane, Inside&& inside, Place&& place) {
#pragma unroll
    for (int u = 0; u < kLanes; ++u) {
      const int block = mx::block_of<kLanes>(u, lane);
      raw[u].zero();
      if (inside(block)) raw[u].load(place(block) + lane % kLanes * E);
    }
  }

  // Writes data where `place(block)` says, and returns the scale that this lane writes. The whole warp calls this.
  template <typename Inside, typename Place>
  __device__ __forceinline__ uint8_t store(int lane, Inside&& inside, Place&& place) const {
    const uint32_t byte = Rounding::byte(amax(lane));
    const uint32_t factor_here = Rounding::factor(byte);
#pragma unroll
    for (int u = 0; u < kLanes; ++u) {
      const float factor = __uint_as_float(__shfl_sync(0xffffffffu, factor_here, lane / kLanes * kLanes + u));
      float v[E];
      raw[u].unpack(v);
#pragma unroll
      for (int e = 0; e < E; ++e) v[e] = __fmul_rn(v[e], factor);
      const int block = mx::block_of<kLanes>(u, lane);
      if (inside(block)) cast_fp8<__nv_fp8_e4m3, true>(v).store(place(block) + lane % kLanes * E);
    }
    return static_cast<uint8_t>(byte);
  }

 private:
  // Of the block whose scale this lane writes. In every step lanes exchange the halves of their maxima that they do not keep: one
  // shuffle fewer than there are maxima, where reducing each by itself takes two or three for each.
  __device__ __forceinline__ uint32_t amax(int lane) const {
    uint32_t held[kLanes];
#pragma unroll
    for (int u = 0; u < kLanes; ++u) {
      Amax<In> of_vector;
      of_vector.merge(raw[u]);
      held[u] = of_vector.float_bits();
    }
    exchange<kLanes / 2>(held, lane);
    return held[0];
  }
  template <int Step>
  __device__ __forceinline__ static void exchange(uint32_t (&held)[kLanes], int lane) {
    const bool upper = lane & Step;
#pragma unroll
    for (int u = 0; u < Step; ++u) {
      const uint32_t kept = upper ? held[u + Step] : held[u], given = upper ? held[u] : held[u + Step];
      held[u] = max(kept, __shfl_xor_sync(0xffffffffu, given, Step));
    }
    if constexpr (Step > 1) exchange<Step / 2>(held, lane);
  }
};

// ---- plain scales -----------------------------------------------------------------------------------------------------------

constexpr int kPlainThreads = 256;

// A share is 32 consecutive blocks of a group. Run: a group's rows follow one another, and it is one run of blocks.
template <typename In, typename Rounding, int E, bool Run>
__global__ void __launch_bounds__(kPlainThreads) mxfp8_quantize_plain_kernel(const __grid_constant__ Mxfp8QuantizeParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t share = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * (kPlainThreads / 32) + threadIdx.x / 32;
  const int64_t first = share * 32, blocks = p.rows * p.row_blocks, begin = blockIdx.y * blocks + first;
  const int left = static_cast<int>(min(blocks - first, int64_t{32}));  // of the share; none or fewer behind the end
  const In* x = static_cast<const In*>(p.x) + blockIdx.y * p.group_pitch;
  uint8_t* data = p.data + begin * mx::kBlock;

  const auto inside = [&](int block) { return block < left; };
  Mxfp8Share<In, Rounding, E> held;
  wait_for_previous_kernel();
  if constexpr (Run) {
    x += first * mx::kBlock;
    held.load(lane, inside, [&](int block) { return x + block * mx::kBlock; });
  } else {
    const int64_t first_row = first / p.row_blocks;
    const uint32_t row_blocks = static_cast<uint32_t>(p.row_blocks), first_col = static_cast<uint32_t>(first - first_row * p.row_blocks);
    held.load(lane, inside, [&](int block) {
      const uint32_t col = first_col + block, further = col < row_blocks ? 0 : col / row_blocks;
      return x + (first_row + further) * p.pitch + static_cast<int64_t>(col - further * row_blocks) * mx::kBlock;
    });
  }
  allow_next_kernel();
  const uint8_t scale = held.store(lane, inside, [&](int block) { return data + block * mx::kBlock; });
  const int block = mx::written_by<mx::kBlock / E>(lane);
  if (block < left) p.scales[begin + block] = scale;
}

// ---- swizzled scales --------------------------------------------------------------------------------------------------------

constexpr int kSwizzledThreads = 32 * mx::kShares;

// The group that a row of tiles belongs to.
struct TileRow {
  int64_t group;      // of x [groups, rows, K]
  int64_t first_row;  // of that, the tiles' first
  int64_t rows;       // how many of the 128 there are, at most 0 for none
  bool scaled;        // false: the rows have data and no scales
};

// From cumulative ends: every thread takes one group, and their padded sizes are summed over the block. Rows behind the last end
// come as one more group, without scales.
__device__ __forceinline__ TileRow tile_row_of(const int32_t* offs, int groups, int64_t rows, int64_t tile_row) {
  __shared__ int totals[mx::kShares];
  __shared__ int found_begin, found_end, found_first, found_group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int most = static_cast<int>(rows), wanted = static_cast<int>(tile_row);
  int before = 0;
  for (int base = 0; base <= groups; base += kSwizzledThreads) {
    const int group = base + threadIdx.x;
    int begin = 0, end = 0;
    if (group <= groups) {
      begin = group == 0 ? 0 : min(max(offs[group - 1], 0), most);
      end = group == groups ? most : min(max(offs[group], 0), most);
    }
    const int count = (max(end - begin, 0) + mx::kTileRows - 1) / mx::kTileRows;
    int sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    int all = 0;
#pragma unroll
    for (int w = 0; w < mx::kShares; ++w) {
      if (w < warp) sum += totals[w];
      all += totals[w];
    }
    const int first = before + sum - count;
    if (first <= wanted && wanted < first + count) {
      found_begin = begin, found_end = end, found_first = first, found_group = group;
    }
    before += all;
    __syncthreads();
    if (wanted < before) {
      const int64_t row = found_begin + int64_t{wanted - found_first} * mx::kTileRows;
      return {0, row, found_end - row, found_group < groups};
    }
  }
  return {0, 0, 0, false};
}

// A block of threads takes a row of tiles, and of that `tiles_run` tiles; a warp one share of each. Three such blocks at once where
// a lane's part of a share is 64 bytes, two where it is 128.
template <typename In, typename Rounding, int E>
__global__ void __launch_bounds__(kSwizzledThreads, E == 8 ? 3 : 2)
    mxfp8_quantize_swizzled_kernel(const __grid_constant__ Mxfp8QuantizeParams p) {
  constexpr int kLanes = mx::kBlock / E;
  const int lane = threadIdx.x % 32, share = threadIdx.x / 32;
  const unsigned runs = (p.tiles + p.tiles_run - 1) / p.tiles_run, place = gridDim.x - 1 - blockIdx.x;
  const int64_t tile_row = place / runs;
  const int first_tile = static_cast<int>(place % runs) * p.tiles_run;

  wait_for_previous_kernel();
  TileRow at;
  if (p.offs_count >= 0) {
    at = tile_row_of(p.offs, p.offs_count, p.rows, tile_row);
  } else {
    const int64_t tile_rows = p.tile_rows / p.groups, group = tile_row / tile_rows;
    const int64_t row = (tile_row - group * tile_rows) * mx::kTileRows;
    at = {group, row, p.rows - row, true};
  }
  const In* x = static_cast<const In*>(p.x) + at.group * p.group_pitch + at.first_row * p.pitch;
  uint8_t* data = p.data + (at.group * p.rows + at.first_row) * p.row_blocks * mx::kBlock;

  const int64_t cols = p.row_blocks * mx::kBlock;
  const int rows = static_cast<int>(min(at.rows, int64_t{mx::kTileRows})), last_tile = min(first_tile + p.tiles_run, p.tiles);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first_col = int64_t{tile} * mx::kTileCols;
    const int left = static_cast<int>(min(p.row_blocks - first_col, int64_t{mx::kTileCols}));
    const auto inside = [&](int block) { return mx::share_row(share, block) < rows && mx::share_col(block) < left; };
    const auto column = [&](int block) { return (first_col + mx::share_col(block)) * mx::kBlock; };
    Mxfp8Share<In, Rounding, E> held;
    held.load(lane, inside, [&](int block) { return x + mx::share_row(share, block) * p.pitch + column(block); });
    if (tile + 1 == last_tile) allow_next_kernel();
    const uint8_t scale = held.store(lane, inside, [&](int block) { return data + mx::share_row(share, block) * cols + column(block); });
    const int block = mx::written_by<kLanes>(lane);
    const int64_t byte = (tile_row * p.tiles + tile) * mx::kTileBytes + mx::tile_offset(mx::share_row(share, block), mx::share_col(block));
    if (byte < p.scale_bytes) p.scales[byte] = at.scaled ? scale : 0;
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------

// Checks x and data, and fills in what both layouts need; whether 16-byte accesses reach every block.
template <typename In>
bool mxfp8_params(const TensorView& x, const TensorView& data_out, const TensorView& scales, Device& device, Mxfp8QuantizeParams* p) {
  TensorMatcher().dtype<In>().device(device).verify(x, "x");
  TensorMatcher().dtype<__nv_fp8_e4m3>().contiguous().device(device).verify(data_out, "data");
  TensorMatcher().dtype<__nv_fp8_e8m0>().contiguous().device(device).verify(scales, "scales");
  const int last = x.ndim() - 1;
  if (last != 1 && last != 2) TVM_FFI_THROW(ValueError) << "x: wanted [T, K] or [E, N, K], found shape " << shape_of(x);
  const int64_t cols = x.shape()[last];
  if (cols % mx::kBlock != 0) {
    TVM_FFI_THROW(ValueError) << "x: wanted rows of a multiple of " << mx::kBlock << " elements, found shape " << shape_of(x);
  }
  if (x.numel() > 0 && x.strides()[last] != 1) {
    TVM_FFI_THROW(ValueError) << "x: wanted rows with unit stride, found strides " << strides_of(x) << " of shape " << shape_of(x);
  }
  check_row_length(cols, "x");
  bool same = data_out.ndim() == x.ndim();
  for (int i = 0; same && i <= last; ++i) same = data_out.shape()[i] == x.shape()[i];
  if (!same) TVM_FFI_THROW(ValueError) << "data: wanted the shape of x, " << shape_of(x) << ", found " << shape_of(data_out);

  p->x = data(x), p->data = data<uint8_t>(data_out), p->scales = data<uint8_t>(scales);
  p->groups = last == 2 ? x.shape()[0] : 1, p->rows = x.shape()[last - 1], p->row_blocks = cols / mx::kBlock;
  p->pitch = p->rows > 1 ? x.strides()[last - 1] : cols;
  p->group_pitch = p->groups > 1 ? x.strides()[0] : p->rows * p->pitch;
  const bool pitches = p->pitch * sizeof(In) % 16 == 0 && p->group_pitch * sizeof(In) % 16 == 0;
  return aligned(p->x, 16) && aligned(p->data, 8) && pitches;
}

inline void check_scales(const TensorView& scales, int64_t wanted) {
  if (scales.numel() != wanted) TVM_FFI_THROW(ValueError) << "scales: wanted " << wanted << " elements, found shape " << shape_of(scales);
}

inline unsigned checked_grid(int64_t blocks) {
  if (blocks > INT32_MAX) TVM_FFI_THROW(ValueError) << "x: wanted work for at most 2^31 - 1 blocks of threads, found " << blocks;
  return static_cast<unsigned>(blocks);
}

template <typename In>
constexpr int kMxVector = 16 / sizeof(In);  // elements of one access

template <typename In, typename Rounding>
struct Mxfp8QuantizePlain {
  static void run(TensorView x, TensorView data_out, TensorView scales) {
    Device device;
    Mxfp8QuantizeParams p{};
    const bool vectors = mxfp8_params<In>(x, data_out, scales, device, &p);
    check_scales(scales, p.groups * p.rows * p.row_blocks);
    if (p.group_pitch == p.rows * p.pitch) p.rows *= p.groups, p.groups = 1;
    if (p.groups > 65535) TVM_FFI_THROW(ValueError) << "x: wanted at most 65535 matrices with strides between, found " << p.groups;
    DeviceGuard guard(device.id());
    cudaStream_t stream = env_stream(device.id());
    const bool run = p.rows <= 1 || p.pitch == p.row_blocks * mx::kBlock;
    if (vectors && run) return launch<kMxVector<In>, true>(p, stream);
    if (vectors) return launch<kMxVector<In>, false>(p, stream);
    launch<1, false>(p, stream);
  }

 private:
  template <int E, bool Run>
  static void launch(const Mxfp8QuantizeParams& p, cudaStream_t stream) {
    const unsigned blocks = checked_grid(ceil_div(p.rows * p.row_blocks, kPlainThreads));  // a thread a block of elements
    Launch(dim3(blocks, static_cast<unsigned>(p.groups)), kPlainThreads)
        .stream(stream)
        .programmatic()
        .run(mxfp8_quantize_plain_kernel<In, Rounding, E, Run>, p);
  }
};

template <typename In, typename Rounding>
struct Mxfp8QuantizeSwizzled {
  static void run(TensorView x, Optional<TensorView> offs, TensorView data_out, TensorView scales) {
    Device device;
    Mxfp8QuantizeParams p{};
    const bool vectors = mxfp8_params<In>(x, data_out, scales, device, &p);
    p.tiles = static_cast<int>(mx::ceil_tiles(p.row_blocks, mx::kTileCols)), p.offs_count = -1;
    int64_t scale_rows = mx::ceil_tiles(p.rows, mx::kTileRows) * mx::kTileRows * p.groups;
    if (offs.has_value()) {
      const TensorView& ends = offs.value();
      Symbol groups("E");
      TensorMatcher({groups}).dtype<int32_t>().contiguous().device(device).verify(ends, "offs");
      if (x.ndim() != 2 || p.rows > INT32_MAX) {
        TVM_FFI_THROW(ValueError) << "x: wanted [T, K] with T below 2^31 beside offs, found shape " << shape_of(x);
      }
      scale_rows = p.rows + groups.value() * mx::kTileRows;
      p.offs = data<int32_t>(ends), p.offs_count = static_cast<int>(groups.value());
    }
    p.scale_bytes = scale_rows * p.tiles * mx::kTileCols;
    check_scales(scales, p.scale_bytes);
    if (p.scale_bytes == 0) return;
    p.tile_rows = mx::ceil_tiles(scale_rows, mx::kTileRows);
    DeviceGuard guard(device.id());
    // Many tiles: a block takes several and looks for its group once.
    p.tiles_run = static_cast<int>(std::clamp<int64_t>(p.tile_rows * p.tiles / (16 * sm_count(device.id())), 1, std::min(p.tiles, 8)));
    vectors ? launch<kMxVector<In>>(p, device.id()) : launch<1>(p, device.id());
  }

 private:
  template <int E>
  static void launch(const Mxfp8QuantizeParams& p, int device) {
    Launch(checked_grid(p.tile_rows * ceil_div(p.tiles, p.tiles_run)), kSwizzledThreads)
        .stream(env_stream(device))
        .programmatic()
        .run(mxfp8_quantize_swizzled_kernel<In, Rounding, E>, p);
  }
};

}  // namespace inductor_ext
