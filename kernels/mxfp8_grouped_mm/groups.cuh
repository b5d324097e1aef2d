// Where each group of a grouped product lies, worked out on the device: no one on the host ever knows how many tokens it has.
//
//   offs [E] int32: group g is rows [offs[g - 1], offs[g]) of x and of out
//   x_scale: tiles of 128 rows x 4 scales; every group starts a block of 128 rows of its own, so that its first one is the
//   sum of the earlier groups' sizes, each rounded up to 128
//
// `place_of_group` is that arithmetic, for host and device. `set_up_groups` is the kernel: one block, a prefix sum over the groups,
// and a `Write` that stores what the product wants. tests/kernels/test_mxfp8_blackwell.py runs both on a CPU.
#pragma once

#include <inductor_ext/launch.cuh>
#include <inductor_ext/mx.cuh>

namespace inductor_ext {

// ---- scales in tiles --------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int64_t padded_rows(int64_t rows) { return mx::ceil_tiles(rows, mx::kTileRows) * mx::kTileRows; }
// Tiles along K: each covers 128 elements.
__host__ __device__ constexpr int64_t scale_tiles(int64_t k) { return mx::ceil_tiles(k, mx::kBlock * mx::kTileCols); }

// ---- groups -----------------------------------------------------------------------------------------------------------------

struct GroupedSizes {
  int64_t tokens;           // T, rows of x
  int experts, n, k;
  int64_t x_pitch;          // bytes from a row to the next
  int64_t out_pitch;
  int out_size;             // bytes of an element
  int64_t scale_rows;       // rows that x_scale has room for
};

// Bytes from the start of each tensor to what the group has of it.
struct GroupPlace {
  int tokens;
  int64_t x, x_scale, w, w_scale, out;
};

// An `offs` that is out of order or out of range, or an x_scale with too few rows for it, makes groups empty or shorter. It
// never makes one reach past a tensor.
__host__ __device__ constexpr int clamped_offset(int offset, int64_t tokens) {
  return offset < 0 ? 0 : offset > tokens ? static_cast<int>(tokens) : offset;
}
__host__ __device__ constexpr int group_tokens(int start, int end) { return end > start ? end - start : 0; }

// Group `group` has rows [start, end), clamped already; `scale_row` is the sum of the earlier groups' padded_rows.
__host__ __device__ constexpr GroupPlace place_of_group(const GroupedSizes& s, int group, int start, int end, int64_t scale_row) {
  GroupPlace place{};
  place.tokens = group_tokens(start, end);
  if (scale_row + padded_rows(place.tokens) > s.scale_rows) place.tokens = 0;
  if (place.tokens == 0) start = 0, scale_row = 0;  // nothing is read there, but the addresses stay inside the tensors
  place.x = start * s.x_pitch;
  place.out = start * s.out_pitch;
  place.x_scale = scale_row / mx::kTileRows * scale_tiles(s.k) * mx::kTileBytes;
  place.w = int64_t{group} * s.n * s.k;
  place.w_scale = group * (padded_rows(s.n) / mx::kTileRows) * scale_tiles(s.k) * mx::kTileBytes;
  return place;
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------

constexpr int kGroupThreads = 128;

// The sum of the earlier threads' values, and in `total` that of all of the block's.
__device__ __forceinline__ int64_t exclusive_sum(int64_t value, int64_t& total) {
  constexpr int kWarps = kGroupThreads / 32;
  __shared__ int64_t sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t below = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += below;
  }
  __syncthreads();  // the sums of an earlier call have been read
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += sums[i];
    total += sums[i];
  }
  return before + sum - value;
}

// One block. `write(group, place)` stores what is wanted of each group.
template <typename Write>
__global__ void __launch_bounds__(kGroupThreads) set_up_groups(GroupedSizes sizes, const int* offs, Write write) {
  wait_for_previous_kernel();  // which may still be writing offs, or reading what `write` stores
  allow_next_kernel();         // the product waits for all of this one before it reads anything
  int64_t scale_rows = 0;      // of the groups before this round's
  for (int first = 0; first < sizes.experts; first += kGroupThreads) {
    const int group = first + static_cast<int>(threadIdx.x);
    const bool inside = group < sizes.experts;
    const int start = inside && group > 0 ? clamped_offset(offs[group - 1], sizes.tokens) : 0;
    const int end = inside ? clamped_offset(offs[group], sizes.tokens) : 0;
    int64_t total = 0;
    const int64_t before = exclusive_sum(padded_rows(group_tokens(start, end)), total);
    if (inside) write(group, place_of_group(sizes, group, start, end, scale_rows + before));
    scale_rows += total;
  }
}

template <typename Write>
void launch_set_up(const GroupedSizes& sizes, const int* offs, const Write& write, int device) {
  Launch(1, kGroupThreads).stream(env_stream(device)).programmatic().run(set_up_groups<Write>, sizes, offs, write);
}

// ---- for tests --------------------------------------------------------------------------------------------------------------

// The same one group after the other, on the host.
template <typename Write>
void set_up_groups_on_host(const GroupedSizes& sizes, const int* offs, const Write& write) {
  int64_t scale_row = 0;
  for (int group = 0; group < sizes.experts; ++group) {
    const int start = group > 0 ? clamped_offset(offs[group - 1], sizes.tokens) : 0;
    const int end = clamped_offset(offs[group], sizes.tokens);
    write(group, place_of_group(sizes, group, start, end, scale_row));
    scale_row += padded_rows(group_tokens(start, end));
  }
}

// Of dense tensors.
inline GroupedSizes dense_sizes(int64_t tokens, int64_t experts, int64_t n, int64_t k, int64_t out_size, int64_t scale_rows) {
  GroupedSizes s{};
  s.tokens = tokens, s.experts = static_cast<int>(experts), s.n = static_cast<int>(n), s.k = static_cast<int>(k);
  s.x_pitch = k, s.out_pitch = n * out_size, s.out_size = static_cast<int>(out_size), s.scale_rows = scale_rows;
  return s;
}

// Tokens and the five offsets of each group: rows of a table [E, 6].
struct WritePlace {
  int64_t* table;
  __host__ __device__ void operator()(int group, const GroupPlace& p) const {
    const int64_t values[] = {p.tokens, p.x, p.x_scale, p.w, p.w_scale, p.out};
    for (int i = 0; i < 6; ++i) table[group * 6 + i] = values[i];
  }
};

}  // namespace inductor_ext
