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
// A warp takes 32 blocks one after the other at a time (mx.cuh: a warp's share), wherever their scales go: whole lines are read,
// and written but for an fp32 x's. Work is taken from the end backwards: what the kernel ahead wrote last is still in L2, and what
// this one writes last is what a product reads first.
//
// Swizzled scales of a row are four bytes in every tile that it crosses, so a warp's store of 32 reaches eight sectors where tiles
// taken whole would fill one. That is 1/12 more sectors for L2 and none more for DRAM, which sees a sector once it is full. Tiles
// taken whole read 256 bytes of each of 128 rows, and had to know their group before they could ask for x: on H200 that was 0.95
// of a copy's bandwidth with one group and 0.89 with 128, where plain scales were written at 1.02 ([65536, 2048] bf16). Here x is
// on its way while the group is looked for. (Swizzled scales as they are now have not been timed on a GPU.)
//
// What pads is the work of blocks of threads of their own, the first of the grid, in stores of 16 bytes: with T = 64, K = 2048 and
// E = 128 it is 1.05 MB of scales beside 16 blocks of data, so 129 blocks of threads with 8 KB each, all resident at once. (Taken
// as 2064 tiles that each looked for their group, in bytes, that was five waves and 19.6 us.)
#pragma once

#include <tvm/ffi/function.h>

#include <algorithm>
#include <climits>
#include <type_traits>

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
  int offs_count;       // E
  int tiles;            // of a row of tiles
  unsigned pad_blocks;  // blocks of threads that write what pads, the first of the grid
  int64_t scale_bytes;  // the buffer's size
  int steps;            // of a block of threads; each is `step_rows` rows and `step_cols` blocks further
  uint32_t step_rows, step_cols;
};

// kTiles: every matrix of x is a group. kGroups: offs says where they end.
enum class Mxfp8Scales { kPlain, kTiles, kGroups };

constexpr int kMxThreads = 256, kMxWarps = kMxThreads / 32;

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

// ---- groups -----------------------------------------------------------------------------------------------------------------

struct GroupEnds {
  int begin, end;  // rows of x
};

// Of cumulative ends. Behind the last group is a row that never comes.
__device__ __forceinline__ GroupEnds group_ends(const int32_t* offs, int groups, int64_t rows, int group) {
  const int most = static_cast<int>(rows);
  if (group >= groups) return {most, INT_MAX};
  return {group == 0 ? 0 : min(max(offs[group - 1], 0), most), min(max(offs[group], 0), most)};
}

// The group of a row: its rows of x, and its first row of tiles, negative for rows of no group.
struct RowGroup {
  int begin, end, tile_row;
};

// kMxThreads groups, and the rows of tiles before each of them.
struct GroupTable {
  int begin[kMxThreads], end[kMxThreads];
  int tile_row[kMxThreads];  // counted from the first group of the same warp
  int of_warp[kMxWarps];     // rows of tiles of a warp's groups

  // Every thread puts in one group. The whole block calls this; one barrier, since a warp's sum goes no further than itself.
  __device__ __forceinline__ void fill(GroupEnds ends, bool inside) {
    const int lane = threadIdx.x % 32, rows = inside ? max(ends.end - ends.begin, 0) : 0;
    const int count = rows / mx::kTileRows + (rows % mx::kTileRows != 0);
    int sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    begin[threadIdx.x] = ends.begin, end[threadIdx.x] = ends.end, tile_row[threadIdx.x] = sum - count;
    if (lane == 31) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
  }
  // The rows of tiles of the groups that warps before `warp` put in.
  __device__ __forceinline__ int before(int warp) const {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kMxWarps; ++w) sum += w < warp ? of_warp[w] : 0;
    return sum;
  }
  // The first of `count` groups that ends behind the row. `first`: the rows of tiles of groups before those in the table.
  __device__ __forceinline__ RowGroup group_of(int row, int count, int first) const {
    int low = 0;
    for (int high = count; low < high;) {
      const int middle = (low + high) / 2;
      if (end[middle] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low == count) return {count == 0 ? 0 : end[count - 1], INT_MAX, -1};
    return {begin[low], end[low], first + before(low / 32) + tile_row[low]};
  }
};

// That of `row`, of which every thread has its own. `ends`: those of group threadIdx.x, asked for before. The whole block calls
// this, and with no more than kMxThreads groups `table` has all of them from then on. They are one step: five shuffles, a barrier
// and a search in shared memory, done before x arrives.
__device__ __forceinline__ RowGroup group_of(GroupTable& table, const int32_t* offs, int groups, int64_t rows, int row,
                                             GroupEnds ends) {
  RowGroup at{0, INT_MAX, -1};
  int before = 0;
  for (int base = 0; base < groups; base += kMxThreads) {
    if (base > 0) {
      __syncthreads();  // all have read what the table had
      ends = group_ends(offs, groups, rows, base + static_cast<int>(threadIdx.x));
    }
    table.fill(ends, base + static_cast<int>(threadIdx.x) < groups);
    if (at.tile_row < 0) at = table.group_of(row, min(groups - base, kMxThreads), before);
    before += table.before(kMxWarps);
  }
  return at;
}

// ---- what pads --------------------------------------------------------------------------------------------------------------

// 16 bytes of a tile hold the scales of four rows, 32 apart.
constexpr int kPadUnit = 16, kTileUnits = mx::kTileBytes / kPadUnit;
constexpr int kPadPiece = 2 * kMxThreads;  // units of a row of tiles that a block of threads takes at once

// Zeroes piece `piece` of a row of tiles but for its first `rows` rows.
__device__ __forceinline__ void pad_tiles(const Mxfp8QuantizeParams& p, int64_t tile_row, int rows, int piece) {
  const int units = min(p.tiles * kTileUnits, (piece + 1) * kPadPiece);
  for (int unit = piece * kPadPiece + static_cast<int>(threadIdx.x); unit < units; unit += kMxThreads) {
    const int64_t byte = tile_row * p.tiles * mx::kTileBytes + int64_t{unit} * kPadUnit;
    if (byte < 0 || byte + kPadUnit > p.scale_bytes) continue;  // ends that are none
    const int kept = (rows - unit % kTileUnits + 31) / 32;      // of the four rows
    if (kept == 0) {
      Bytes<kPadUnit>{}.store(p.scales + byte);
      continue;
    }
#pragma unroll
    for (int i = 1; i < kPadUnit / mx::kTileCols; ++i) {
      if (i >= kept) reinterpret_cast<uint32_t*>(p.scales + byte)[i] = 0;
    }
  }
}

// What pads the groups, and all that is behind the last one, spread over `pad_blocks` blocks of threads.
__device__ __forceinline__ void pad_groups(GroupTable& table, const Mxfp8QuantizeParams& p) {
  const int pieces = (p.tiles * kTileUnits + kPadPiece - 1) / kPadPiece;
  int64_t tile_rows = 0;
  for (int base = 0; base < p.offs_count; base += kMxThreads) {
    __syncthreads();  // all have read what the table had
    const int mine = base + static_cast<int>(threadIdx.x), count = min(p.offs_count - base, kMxThreads);
    table.fill(group_ends(p.offs, p.offs_count, p.rows, mine), mine < p.offs_count);
    for (int item = blockIdx.x; item < count * pieces; item += p.pad_blocks) {
      const int group = item / pieces, rows = table.end[group] - table.begin[group];
      if (rows <= 0 || rows % mx::kTileRows == 0) continue;
      const int64_t first = tile_rows + table.before(group / 32) + table.tile_row[group];
      pad_tiles(p, first + rows / mx::kTileRows, rows % mx::kTileRows, item % pieces);
    }
    tile_rows += table.before(kMxWarps);
  }
  // The buffer has T + 128 E rows, of 4 bytes for each tile: its end is a word's, not always a unit's.
  const int64_t begin = tile_rows * p.tiles * mx::kTileBytes, units = (p.scale_bytes - begin) / kPadUnit;
  const int64_t thread = int64_t{blockIdx.x} * kMxThreads + threadIdx.x;
  for (int64_t unit = thread; unit < units; unit += int64_t{p.pad_blocks} * kMxThreads) {
    Bytes<kPadUnit>{}.store(p.scales + begin + unit * kPadUnit);
  }
  const int64_t word = p.scale_bytes / kPadUnit * (kPadUnit / 4) + thread;
  if (begin <= word * 4 && word * 4 < p.scale_bytes) reinterpret_cast<uint32_t*>(p.scales)[word] = 0;
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------

// A share is 32 consecutive blocks of a matrix. Run: a matrix' rows follow one another, and it is one run of blocks. A block of
// threads takes kMxThreads blocks side by side, and of swizzled scales `steps` times that many, so that groups are listed once
// for them: listing and looking up is some 150 instructions of a warp, quantising a share 300, and memory lets an SM issue 660
// in the time of a share. Five such blocks are resident where a lane's part of a share is 64 bytes: 80 KB on the way to an SM.
// (0: the compiler's choice.)
template <typename In, typename Rounding, int E, bool Run, Mxfp8Scales Scales>
__global__ void __launch_bounds__(kMxThreads, E == 8 && Scales != Mxfp8Scales::kPlain ? 5 : 0)
    mxfp8_quantize_kernel(const __grid_constant__ Mxfp8QuantizeParams p) {
  constexpr bool kPlain = Scales == Mxfp8Scales::kPlain, kGroups = Scales == Mxfp8Scales::kGroups;
  const int64_t tile_rows = kPlain ? 0 : mx::ceil_tiles(p.rows, mx::kTileRows);  // of a matrix
  __shared__ std::conditional_t<kGroups, GroupTable, int> table;                 // not there but for groups
  if constexpr (!kPlain) {
    if (blockIdx.x < p.pad_blocks) {
      wait_for_previous_kernel();
      allow_next_kernel();
      if constexpr (kGroups) {
        pad_groups(table, p);
      } else {
        pad_tiles(p, (blockIdx.y + 1) * tile_rows - 1, static_cast<int>(p.rows % mx::kTileRows), blockIdx.x);
      }
      return;
    }
  }
  const int lane = threadIdx.x % 32, steps = kPlain ? 1 : p.steps;
  const int64_t share = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * steps * kMxWarps + threadIdx.x / 32;
  const int64_t first = share * 32, blocks = p.rows * p.row_blocks, begin = blockIdx.y * blocks + first;
  const In* x = static_cast<const In*>(p.x) + blockIdx.y * p.group_pitch + (Run ? first * mx::kBlock : 0);
  uint8_t* data = p.data + begin * mx::kBlock;
  int left = static_cast<int>(min(blocks - first, int64_t{1 << 20}));  // from the share on; none or fewer behind the end
  const int written = mx::written_by<mx::kBlock / E>(lane);

  wait_for_previous_kernel();
  GroupEnds ends{};
  if constexpr (kGroups) ends = group_ends(p.offs, p.offs_count, p.rows, threadIdx.x);
  // Where the share's first block is: row and column.
  using Row = std::conditional_t<kGroups, int, int64_t>;
  Row first_row = 0;
  uint32_t first_col = 0;
  const uint32_t row_blocks = static_cast<uint32_t>(p.row_blocks);
  const auto divide = [&] {
    first_row = static_cast<Row>(first / p.row_blocks);
    first_col = static_cast<uint32_t>(first - first_row * p.row_blocks);
  };
  if constexpr (!Run) divide();
  const auto place = [&](int block, auto&& then) {
    const uint32_t col = first_col + block, further = col < row_blocks ? 0 : col / row_blocks;
    return then(first_row + further, col - further * row_blocks);
  };
  RowGroup group{0, 0, -1};
  for (int step = 0; step < steps; ++step, left -= kMxThreads) {
    const auto inside = [&](int block) { return block < left; };
    const auto place_of_data = [&](int block) { return data + block * mx::kBlock; };
    Mxfp8Share<In, Rounding, E> held;
    held.load(lane, inside, [&](int block) {
      if constexpr (Run) return x + block * mx::kBlock;
      return place(block, [&](int64_t row, uint32_t col) { return x + row * p.pitch + static_cast<int64_t>(col) * mx::kBlock; });
    });
    if (step + 1 == steps) allow_next_kernel();
    if constexpr (kPlain) {
      const uint8_t scale = held.store(lane, inside, place_of_data);
      if (written < left) p.scales[begin + written] = scale;
    } else {
      if (Run && step == 0) divide();  // with x on its way
      int64_t byte = -1;  // of the scale
      bool last = false;  // of its row
      place(written, [&](int64_t row, uint32_t col) {
        last = col + 1 == row_blocks;
        int64_t tile_row = blockIdx.y * tile_rows;
        if constexpr (kGroups) {
          const int at = static_cast<int>(row);
          if (step == 0 || p.offs_count > kMxThreads) {
            if (step > 0) __syncthreads();  // all have read what the table had
            group = group_of(table, p.offs, p.offs_count, p.rows, at, ends);
          } else if (at >= group.end) {
            group = table.group_of(at, p.offs_count, 0);
          }
          row -= group.begin, tile_row = group.tile_row;
          if (tile_row < 0) return;
        }
        tile_row += row / mx::kTileRows;
        byte = (tile_row * p.tiles + col / mx::kTileCols) * mx::kTileBytes;
        byte += mx::tile_offset(static_cast<int>(row % mx::kTileRows), col % mx::kTileCols);
      });
      const uint8_t scale = held.store(lane, inside, place_of_data);
      if (written < left && byte >= 0 && byte < p.scale_bytes) {
        p.scales[byte] = scale;
        if (last) {  // up to three that pad the row follow it in the tile
#pragma unroll
          for (int i = 1; i < mx::kTileCols; ++i) {
            if (static_cast<int>(byte % mx::kTileCols) + i < mx::kTileCols) p.scales[byte + i] = 0;
          }
        }
      }
      if constexpr (Run) x += kMxThreads * mx::kBlock;
      data += kMxThreads * mx::kBlock, first_row += p.step_rows, first_col += p.step_cols;
      if (first_col >= row_blocks) first_col -= row_blocks, ++first_row;
    }
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

// On `device`, `p.pad_blocks` blocks of threads before those of data.
template <typename In, typename Rounding, Mxfp8Scales Scales>
void mxfp8_launch(Mxfp8QuantizeParams& p, bool vectors, int device) {
  if (p.groups > 65535) TVM_FFI_THROW(ValueError) << "x: wanted at most 65535 matrices, found " << p.groups;
  const int64_t full = ceil_div(p.rows * p.row_blocks, kMxThreads);  // a thread a block of elements
  // As many steps as leave several waves: five blocks of threads are resident.
  p.steps = 1;
  if (Scales != Mxfp8Scales::kPlain) {
    p.steps = static_cast<int>(std::clamp<int64_t>(full * p.groups / (16 * sm_count(device)), 1, 4));
    p.step_rows = static_cast<uint32_t>(kMxThreads / p.row_blocks), p.step_cols = static_cast<uint32_t>(kMxThreads % p.row_blocks);
  }
  const unsigned blocks = checked_grid(p.pad_blocks + ceil_div(full, p.steps));
  const bool run = p.rows <= 1 || p.pitch == p.row_blocks * mx::kBlock;
  const auto kernel = !vectors ? mxfp8_quantize_kernel<In, Rounding, 1, false, Scales>
                      : run    ? mxfp8_quantize_kernel<In, Rounding, kMxVector<In>, true, Scales>
                               : mxfp8_quantize_kernel<In, Rounding, kMxVector<In>, false, Scales>;
  DeviceGuard guard(device);
  Launch(dim3(blocks, static_cast<unsigned>(p.groups)), kMxThreads).stream(env_stream(device)).programmatic().run(kernel, p);
}

template <typename In, typename Rounding>
struct Mxfp8QuantizePlain {
  static void run(TensorView x, TensorView data_out, TensorView scales) {
    Device device;
    Mxfp8QuantizeParams p{};
    const bool vectors = mxfp8_params<In>(x, data_out, scales, device, &p);
    check_scales(scales, p.groups * p.rows * p.row_blocks);
    if (p.group_pitch == p.rows * p.pitch) p.rows *= p.groups, p.groups = 1;
    mxfp8_launch<In, Rounding, Mxfp8Scales::kPlain>(p, vectors, device.id());
  }
};

template <typename In, typename Rounding>
struct Mxfp8QuantizeSwizzled {
  static void run(TensorView x, Optional<TensorView> offs, TensorView data_out, TensorView scales) {
    Device device;
    Mxfp8QuantizeParams p{};
    const bool vectors = mxfp8_params<In>(x, data_out, scales, device, &p);
    p.tiles = static_cast<int>(mx::ceil_tiles(p.row_blocks, mx::kTileCols));
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
    if (!aligned(p.scales, kPadUnit)) {
      TVM_FFI_THROW(ValueError) << "scales: wanted an address of a multiple of " << kPadUnit << " bytes, as tensor cores do";
    }
    if (p.scale_bytes == 0) return;
    if (!offs.has_value()) {
      const int64_t pieces = ceil_div(int64_t{p.tiles} * kTileUnits, kPadPiece);
      p.pad_blocks = p.rows % mx::kTileRows == 0 ? 0 : static_cast<unsigned>(pieces);
      return mxfp8_launch<In, Rounding, Mxfp8Scales::kTiles>(p, vectors, device.id());
    }
    // All of the buffer may be padding, 8 KB of it a block. One block for each multiprocessor is enough: with many rows at most
    // 128 of a group are.
    p.pad_blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(p.scale_bytes, kPadPiece * kPadUnit), sm_count(device.id())));
    mxfp8_launch<In, Rounding, Mxfp8Scales::kGroups>(p, vectors, device.id());
  }
};

}  // namespace inductor_ext
