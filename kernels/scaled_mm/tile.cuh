// scaled_mm for many tokens: a persistent, warp-specialised kernel. One warp of the first warpgroup feeds a ring of stages through
// the copy engine; two warpgroups multiply.
//
//   pingpong     each consumer has an M × N tile of its own: while one stores its tile the other keeps the tensor cores busy
//   cooperative  both share one M × N tile, half of its rows each
//   clusters     cm × cn CTAs with neighbouring tiles; each brings 1/cn of its rows of a and 1/cm of its rows of b to all that
//                share them. FP8 at full rate wants more bytes a cycle than L2 gives 132 SMs: 128 × 128 tiles ask for 64, L2
//                has about 30, so what neighbours share is fetched once.
//
// Not here: the tiles of a last round taken in halves, so that all CTAs have some, 448 tiles on 132 multiprocessors in 3.6 rounds
// instead of 4. It took as long (0.98 to 1.00 of the speed at 7168 rows on an H200): CTAs that have none may leave the others power.
// Nor RMSNorm and FP8 of the sum with a residual, in clusters of 8 CTAs that hold whole rows of 1024: 0.67 to 0.95 of the speed of two
// launches at 512 to 16 384 rows (benchmarks/results/h200/scaled_mm_add_norm.json, by commit 0262a6b). Fewer such clusters are resident than 132 multiprocessors have room for, and each tile waits twice.
//
// A residual [M, N] to add comes through the copy engine while its tile is multiplied, into the shared memory that the output leaves
// through: the whole tile's, which takes the place of a stage. Heads (`NormRope`) are normalised in registers and rotated in that
// shared memory, where a thread finds the columns of both halves that it needs side by side. Several products are one list of
// tiles, but gate and up (`Gate`), of which a tile has both. The output goes through shared memory and the copy engine, which clips it at M and N.
#pragma once

#include "inductor_ext/launch.cuh"
#include "inductor_ext/swizzle.cuh"
#include "inductor_ext/tensor.h"
#include "inductor_ext/hopper.cuh"
#include "scaled_mm/ends.cuh"
#include "scaled_mm/problem.cuh"

namespace inductor_ext {

constexpr int kTileThreads = 3 * kWarpgroup;
constexpr int kTileMaxStages = 12;

template <typename Out, int M, int N, bool Pingpong, typename End>
struct TileShared {
  static constexpr bool kWhole = End::kAdds || End::kRotates;  // all of a consumer's tile is staged at once
  static constexpr int kColumns = End::kGates ? N / 2 : N;     // of the output
  static constexpr int kRows = Pingpong ? M : M / 2;  // of a consumer's part
  static constexpr int kBlocks = kRows / 64;          // wgmma's M is 64
  static constexpr int kStage = (M + N) * kBlockK;
  static constexpr int kWidth = kColumns * static_cast<int>(sizeof(Out));  // bytes of a row that is stored
  static constexpr int kBox = kWidth % 128 == 0 ? 128 : kWidth % 64 == 0 ? 64 : 32;  // bytes of a row that one store takes
  static constexpr int kBoxColumns = kBox / static_cast<int>(sizeof(Out));
  static constexpr int kChunk = 64 * kBox;  // what is staged at a time: 64 rows of one box
  static constexpr int kVector = (End::kNorms ? 3 : 2) * N;  // scales and bias of a tile's channels, and a norm's weight
  static constexpr int kVectors = 2 * (kVector * 4);         // each consumer's own
  static constexpr int kBarriers = (2 * kTileMaxStages + (End::kAdds ? 2 : 0)) * 8;
  static constexpr int fixed(int chunks) { return 2 * chunks * kChunk + kVectors + kBarriers; }
  static constexpr int fit(int chunks) { return (kSharedLimit - fixed(chunks)) / kStage; }
  // Of each consumer: a second one when it costs no stage.
  static constexpr int kChunks = kWhole ? kWidth / kBox * kBlocks : fit(2) == fit(1) ? 2 : 1;
  static constexpr int kStages = fit(kChunks) < kTileMaxStages ? fit(kChunks) : kTileMaxStages;
  static constexpr int kBytes = kStages * kStage + fixed(kChunks);
  static_assert(kStages >= 3, "the tile leaves no room for a pipeline");
};

struct TileParams {
  Products products;
  int tiles_m;          // in cluster tiles, rounded up
  int tiles_n;          // likewise
  int group;            // cluster tiles of M that are taken together, so that their b stays in L2
  int cluster_m, cluster_n;
  bool static_b;
};

// Where a cluster tile lies: first row, product (the first one, of gate and up) and first channel of this CTA's tile.
struct TileAt {
  int row, channel;
  const Product* product;
  int blocks;  // stages of K
};

template <int M, int Columns>
__device__ __forceinline__ TileAt tile_at(const TileParams& p, int index, int rank_m, int rank_n) {
  const int per_group = p.group * p.tiles_n;
  const int group = index / per_group, rest = index - group * per_group;
  const int first = group * p.group, rows = min(p.group, p.tiles_m - first);
  const int tile_m = first + rest % rows, tile_n = rest / rows * p.cluster_n + rank_n;
  int which = 0;
  while (which + 1 < p.products.count && tile_n >= p.products.of[which + 1].first_tile) ++which;
  const Product& product = p.products.of[which];
  return {(tile_m * p.cluster_m + rank_m) * M, (tile_n - product.first_tile) * Columns, &product, (product.k + kBlockK - 1) / kBlockK};
}

// What a thread's columns of one box are multiplied by: those of `Wgmma`.
template <typename Out, int Box>
struct ChannelScales {
  static constexpr int kGroups = Box / static_cast<int>(sizeof(Out)) / 8;
  float2 of[kGroups];

  // All at once: shared memory is busy with the other consumer's products, and one at a time these reads took 3 000 cycles a tile.
  __device__ __forceinline__ void read(const float* scales) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) of[j] = *reinterpret_cast<const float2*>(scales + 8 * j + 2 * (threadIdx.x % 4));
  }
};

// Two neighbouring sums of a row, scaled. `bias`: of their two channels.
template <bool HasBias>
__device__ __forceinline__ float2 scaled_pair(const float* sums, float row_scale, float2 scale, const float* bias) {
  const float2 by_row = make_float2(__fmul_rn(sums[0], row_scale), __fmul_rn(sums[1], row_scale));
  if constexpr (!HasBias) return make_float2(__fmul_rn(by_row.x, scale.x), __fmul_rn(by_row.y, scale.y));
  // Written as FMAs: nvcc chose some products of some tiles for them, so that tiles, and those with a residual, differed by bytes.
  const float2 added = *reinterpret_cast<const float2*>(bias);
  return make_float2(__fmaf_rn(by_row.x, scale.x, added.x), __fmaf_rn(by_row.y, scale.y, added.y));
}

// One box of a consumer's sums, 64 rows from column `First` of the tile on, scaled, into a chunk. Rows are those of `Wgmma`. With
// `Add` the chunk holds the residual: what a warp has read there it replaces.
template <bool HasBias, bool Add, typename Out, int N, int Box, int First>
__device__ __forceinline__ void stage_output(uint8_t* chunk, const float (&d)[N / 2], const float (&row_scale)[2],
                                             const ChannelScales<Out, Box>& channel_scale, const float* channel_bias) {
  constexpr int kColumns = Box / static_cast<int>(sizeof(Out));
  const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  auto at = [&](int row, int byte) { return in_chunk<Box>(chunk, row, byte); };
  auto scaled = [&](int j, int i) {
    const float* bias = channel_bias + First + 8 * j + 2 * (lane % 4);
    return scaled_pair<HasBias>(d + (First + 8 * j) / 2 + 2 * i, row_scale[i], channel_scale.of[j], bias);
  };
  if constexpr (sizeof(Out) == 2) {
    Out* tag = nullptr;
    auto packed = [&](int j, int i) {
      const float2 pair = scaled(j, i);
      return pack(tag, pair.x, pair.y);
    };
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      const int matrix = lane / 8, row = warp * 16 + lane % 8 + 8 * (matrix & 1), byte = (j + (matrix >> 1)) * 16;
      Raw<Out, 8> value{packed(j, 0), packed(j, 1), packed(j + 1, 0), packed(j + 1, 1)};
      cute::uint128_t& place = *reinterpret_cast<cute::uint128_t*>(at(row, byte));
      if constexpr (Add) {
        Raw<Out, 8> residual;
        cute::SM75_U32x4_LDSM_N::copy(place, residual.words[0], residual.words[1], residual.words[2], residual.words[3]);
        value.add(residual);
      }
      cute::SM90_U32x4_STSM_N::copy(value.words[0], value.words[1], value.words[2], value.words[3], place);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp * 16 + lane / 4 + 8 * i, byte = (8 * j + 2 * (lane % 4)) * 4;
        float2& place = *reinterpret_cast<float2*>(at(row, byte));
        const float2 value = scaled(j, i);
        place = Add ? make_float2(value.x + place.x, value.y + place.y) : value;
      }
    }
  }
}

// One box of act(gate) * up, from columns `First` of both halves of the tile on. Both are scaled and rounded before, and each step
// after is.
template <typename Act, bool HasBias, bool GateSecond, typename Out, int N, int Box, int First>
__device__ __forceinline__ void stage_gated(uint8_t* chunk, const float (&d)[N / 2], const float (&row_scale)[2],
                                            const ChannelScales<Out, Box> (&scales)[2], const float* channel_bias) {
  static_assert(sizeof(Out) == 2, "values are stored as pairs");
  constexpr int kColumns = Box / static_cast<int>(sizeof(Out));
  const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  Out* tag = nullptr;
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += 2) {
    Raw<Out, 8> gate, up;  // two pairs of columns in two rows, in the order that the store takes them in
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int group = j + n / 2, i = n % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = First + 8 * group + half * (N / 2);
        const float* bias = channel_bias + column + 2 * (lane % 4);
        const float2 pair = scaled_pair<HasBias>(d + column / 2 + 2 * i, row_scale[i], scales[half].of[group], bias);
        (half == GateSecond ? gate : up).words[n] = pack(tag, pair.x, pair.y);
      }
    }
    Gated<Act>::template apply<Out>(gate, up);
    const int matrix = lane / 8, row = warp * 16 + lane % 8 + 8 * (matrix & 1), byte = (j + (matrix >> 1)) * 16;
    const uint32_t(&y)[4] = gate.words;
    cute::SM90_U32x4_STSM_N::copy(y[0], y[1], y[2], y[3], *reinterpret_cast<cute::uint128_t*>(in_chunk<Box>(chunk, row, byte)));
  }
}

// A head's sums of one block of 64 rows, scaled and rounded: half of the registers.
template <typename Out>
__device__ __forceinline__ void round_head(HeadRow<Out> (&rows)[2], const float (&d)[kHead / 2], const float (&row_scale)[2],
                                           const float* channel_scale) {
#pragma unroll
  for (int j = 0; j < kHead / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(channel_scale + 8 * j + 2 * (threadIdx.x % 4));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* pair = d + 4 * j + 2 * i;
      rows[i].words[j] = Raw<Out, 2>::pair(pair[0] * row_scale[i] * scale.x, pair[1] * row_scale[i] * scale.y);
    }
  }
}

// Into the two chunks of the head's halves.
template <typename Out, int Box>
__device__ __forceinline__ void stage_head(uint8_t* low, uint8_t* high, const HeadRow<Out> (&rows)[2]) {
  static_assert(Box == 128 && sizeof(Out) == 2, "half a head is a box");
  const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kHead / 8; j += 2) {
    uint8_t* chunk = j < kHead / 16 ? low : high;
    const int matrix = lane / 8, row = warp * 16 + lane % 8 + 8 * (matrix & 1), byte = (j % (kHead / 16) + (matrix >> 1)) * 16;
    cute::SM90_U32x4_STSM_N::copy(rows[0].words[j], rows[1].words[j], rows[0].words[j + 1], rows[1].words[j + 1],
                                  *reinterpret_cast<cute::uint128_t*>(in_chunk<Box>(chunk, row, byte)));
  }
}

// Calls f with 0, 1, … Count - 1 as compile-time numbers: register arrays may be indexed with nothing else.
template <int Count, int I = 0, typename F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (I < Count) {
    f(std::integral_constant<int, I>());
    unrolled<Count, I + 1>(f);
  }
}

template <typename EA, typename EB, typename Out, int M, int N, bool Pingpong, bool Exact, typename End>
__global__ void __launch_bounds__(kTileThreads, 1)
    scaled_mm_tile_kernel(const __grid_constant__ TileParams p, const __grid_constant__ typename End::Params end) {
  using Shared = TileShared<Out, M, N, Pingpong, End>;
  constexpr bool Add = End::kAdds;
  constexpr int kStages = Shared::kStages, kBlocks = Shared::kBlocks;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* staging = shared + kStages * Shared::kStage;
  float* vectors = reinterpret_cast<float*>(staging + 2 * Shared::kChunks * Shared::kChunk);
  uint64_t* full = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(vectors) + Shared::kVectors);
  uint64_t* empty = full + kTileMaxStages;
  uint64_t* residual_full = empty + kTileMaxStages;  // one of each consumer

  const int ctas = p.cluster_m * p.cluster_n, rank = blockIdx.x % ctas;
  const int rank_m = rank % p.cluster_m, rank_n = rank / p.cluster_m;
  const int first = blockIdx.x / ctas, step = gridDim.x / ctas, tiles = p.tiles_m * p.tiles_n;
  const int group = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.products.count; ++i) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.products.of[i].a));
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.products.of[i].b));
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.products.of[i].out));
      if (Add) cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.products.of[i].residual));
    }
    // A stage is free when every warp that reads it, in every CTA that this one's loads reach, has said so.
    const int readers = (Pingpong ? 4 : 8) * (p.cluster_m + p.cluster_n - 1);
    for (int s = 0; s < kStages; ++s) FullBarrier::init(full + s, 1), EmptyBarrier::init(empty + s, readers);
    if (Add) FullBarrier::init(residual_full, 1), FullBarrier::init(residual_full + 1, 1);
    cutlass::arch::fence_barrier_init();
  }
  if (ctas > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }

  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x == 0) {
      uint16_t same_m = 0, same_n = 0;
      for (int i = 0; i < p.cluster_n; ++i) same_m |= 1 << (rank_m + p.cluster_m * i);
      for (int i = 0; i < p.cluster_m; ++i) same_n |= 1 << (i + p.cluster_m * rank_n);
      const int a_rows = M / p.cluster_n, b_rows = N / p.cluster_m;
      auto load_a = [&](const TileAt& tile, int block, int s) {
        uint8_t* to = shared + s * Shared::kStage + rank_n * a_rows * kBlockK;
        const int row = tile.row + rank_n * a_rows;
        if (p.cluster_n > 1) {
          load_tile_to(same_m, &tile.product->a, full + s, to, block * kBlockK, row);
        } else {
          load_tile(&tile.product->a, full + s, to, block * kBlockK, row);
        }
      };
      auto load_b = [&](const TileAt& tile, int block, int s) {
        uint8_t* to = shared + s * Shared::kStage + (M + rank_m * b_rows) * kBlockK;
        if constexpr (End::kGates) {  // both, or one for two CTAs
          if (p.cluster_m > 1) {
            load_tile_to(same_n, &tile.product->b, full + s, to, block * kBlockK, tile.channel, rank_m);
          } else {
            load_tile(&tile.product->b, full + s, to, block * kBlockK, tile.channel, 0);
          }
          return;
        }
        const int row = tile.channel + rank_m * b_rows;
        if (p.cluster_m > 1) {
          load_tile_to(same_n, &tile.product->b, full + s, to, block * kBlockK, row);
        } else {
          load_tile(&tile.product->b, full + s, to, block * kBlockK, row);
        }
      };
      Slot slot;
      slot.phase = 1;  // the first time round every stage is free
      int ahead = 0;
      if (p.static_b && first < tiles) {  // a few stages of weights before the kernel ahead has ended
        const TileAt tile = tile_at<M, Shared::kColumns>(p, first, rank_m, rank_n);
        for (; ahead < min(tile.blocks, kStages); ++ahead) {
          FullBarrier::arrive_and_expect_tx(full + ahead, Shared::kStage);
          load_b(tile, ahead, ahead);
        }
      }
      wait_for_previous_kernel();
      for (int index = first; index < tiles; index += step) {
        const TileAt tile = tile_at<M, Shared::kColumns>(p, index, rank_m, rank_n);
        for (int block = 0; block < tile.blocks; ++block) {
          if (ahead > 0) {
            --ahead;
          } else {
            EmptyBarrier::wait(empty + slot.index, slot.phase);
            FullBarrier::arrive_and_expect_tx(full + slot.index, Shared::kStage);
            load_b(tile, block, slot.index);
          }
          load_a(tile, block, slot.index);
          slot.advance(kStages);
        }
      }
      allow_next_kernel();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    const int consumer = group - 1, warp = threadIdx.x / 32 % 4;
    const bool leader = threadIdx.x % kWarpgroup == 0;
    uint8_t* own_staging = staging + consumer * Shared::kChunks * Shared::kChunk;
    float* channel_scale = vectors + consumer * Shared::kVector;
    float* channel_bias = channel_scale + N;
    Out* head_weight = reinterpret_cast<Out*>(channel_bias + N);  // of a norm only
    int staged = 0;  // chunks so far
    uint32_t residual_phase = 0;
    auto meet = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, consumer); };
    const bool reaches = lane < ctas && (lane % p.cluster_m == rank_m || lane / p.cluster_m == rank_n);
    auto release = [&](int s) {
      if (ctas == 1) {
        if (lane == 0) EmptyBarrier::arrive(empty + s);
      } else {
        EmptyBarrier::arrive(empty + s, lane, reaches);
      }
    };

    wait_for_previous_kernel();
    if (Pingpong && consumer == 1) cutlass::arch::NamedBarrier::arrive(2 * kWarpgroup, 2);  // the first tile is consumer 0's
    Slot slot;
    int turn = 0;
    for (int index = first; index < tiles; index += step, turn ^= 1) {
      const TileAt tile = tile_at<M, Shared::kColumns>(p, index, rank_m, rank_n);
      if (Pingpong && turn != consumer) {
        slot.skip(tile.blocks, kStages);
        continue;
      }
      const Product& product = *tile.product;
      const int row0 = tile.row + (Pingpong ? 0 : consumer * Shared::kRows);

      // Asked for before the products and used after them.
      if (Add && leader) {
        cute::tma_store_wait<0>();  // the copy engine has read the last tile, which every warp had finished before
        FullBarrier::arrive_and_expect_tx(residual_full + consumer, Shared::kChunks * Shared::kChunk);
        for (int i = 0; i < Shared::kChunks; ++i) {
          const int column = tile.channel + i / kBlocks * Shared::kBoxColumns, row = row0 + i % kBlocks * 64;
          load_tile(&product.residual, residual_full + consumer, own_staging + i * Shared::kChunk, column, row);
        }
      }
      bool rotates = false;
      if constexpr (End::kRotates) rotates = tile.product - p.products.of < end.products;
      float scale[kBlocks][2], channel[2] = {};
      Out weight{};
      float added[2] = {-0.f, -0.f};  // where there is no bias: what changes no number
      if constexpr (End::kNorms) {
        if (rotates) weight = static_cast<const Out*>(end.weight[tile.product - p.products.of])[threadIdx.x % kWarpgroup];
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = min(row0 + b * 64 + warp * 16 + lane / 4 + 8 * i, p.products.m - 1);
          scale[b][i] = product.scale_a[static_cast<int64_t>(row) * product.scale_a_stride];
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = threadIdx.x % kWarpgroup + i * kWarpgroup;
        if (at < N) {
          const int half = End::kGates ? at / Shared::kColumns : 0;
          const Product& of = tile.product[half];
          const int column = min(tile.channel + at - half * Shared::kColumns, of.n - 1);
          channel[i] = of.scale_b[static_cast<int64_t>(column) * of.scale_b_stride];
          if (of.bias != nullptr) added[i] = widen(static_cast<const Out*>(of.bias)[column]);
        }
      }

      float d[kBlocks][N / 2];
      if constexpr (Exact) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (int i = 0; i < N / 2; ++i) d[b][i] = 0.f;
        }
      }
      // Consumers take turns in the ring: a wait for a stage tells only odd rounds from even ones, so one that ran ahead of the
      // other's tile would take that tile's stages for its own.
      if constexpr (Pingpong) cutlass::arch::NamedBarrier::sync(2 * kWarpgroup, 2 + consumer);
      int previous = -1;
      for (int block = 0; block < tile.blocks; ++block) {
        FullBarrier::wait(full + slot.index, slot.phase);
        const uint8_t* a = shared + slot.index * Shared::kStage + (Pingpong ? 0 : consumer * Shared::kRows * kBlockK);
        const uint8_t* b_tile = shared + slot.index * Shared::kStage + M * kBlockK;
        if constexpr (Exact) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            float part[N / 2];
            fence_registers(part);
            cute::warpgroup_arrive();
            Wgmma<EA, EB, N>::stage(a + b * 64 * kBlockK, b_tile, part, true);
            cute::warpgroup_commit_batch();
            cute::warpgroup_wait<0>();
            if (b == kBlocks - 1) release(slot.index);
            fence_registers(part);
#pragma unroll
            for (int i = 0; i < N / 2; ++i) d[b][i] += part[i];
          }
        } else {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) fence_registers(d[b]);
          cute::warpgroup_arrive();
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) Wgmma<EA, EB, N>::stage(a + b * 64 * kBlockK, b_tile, d[b], block == 0);
          cute::warpgroup_commit_batch();
          cute::warpgroup_wait<1>();
          if (previous >= 0) release(previous);
          previous = slot.index;
        }
        slot.advance(kStages);
      }
      if constexpr (Pingpong) cutlass::arch::NamedBarrier::arrive(2 * kWarpgroup, 2 + (consumer ^ 1));
      if constexpr (!Exact) {
        cute::warpgroup_wait<0>();
        if (previous >= 0) release(previous);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) fence_registers(d[b]);
      }

      // Those of the last tile were read before its last `meet`.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = threadIdx.x % kWarpgroup + i * kWarpgroup;
        if (at < N) channel_scale[at] = channel[i], channel_bias[at] = added[i];
      }
      if constexpr (End::kNorms) head_weight[threadIdx.x % kWarpgroup] = weight;
      if constexpr (End::kRotates) {
        if (leader) cute::tma_store_wait<0>();  // of the last tile, long ago
      }
      meet();
      if constexpr (End::kRotates) {
        unrolled<kBlocks>([&](auto b) {
          uint8_t* low = own_staging + 2 * b * Shared::kChunk;
          HeadRow<Out> rows[2];
          round_head<Out>(rows, d[b], scale[b], channel_scale);
          if constexpr (End::kNorms) {
            if (rotates) norm_heads<typename End::Norm>(rows, head_weight, end.eps);
          }
          stage_head<Out, Shared::kBox>(low, low + Shared::kChunk, rows);
          if (rotates) {
            RopeTables<Out> tables;
            tables.read(end, row0 + b * 64, p.products.m);
            __syncwarp();  // a warp rotates the rows that it has staged
            tables.rotate([&](int half, int row, int piece) {
              return reinterpret_cast<uint4*>(in_chunk<Shared::kBox>(low + half * Shared::kChunk, row, piece * 16));
            });
          }
          cute::tma_store_fence();
          meet();
          if (leader) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              cute::SM90_TMA_STORE_2D::copy(&product.out, low + half * Shared::kChunk, tile.channel + half * Shared::kBoxColumns, row0 + b * 64);
            }
            cute::tma_store_arrive();
          }
        });
        continue;
      }
      if constexpr (Add) {
        FullBarrier::wait(residual_full + consumer, residual_phase);
        residual_phase ^= 1;
      }
      bool has_bias = product.bias != nullptr;
      if constexpr (End::kGates) has_bias |= tile.product[1].bias != nullptr;
      unrolled<Shared::kWidth / Shared::kBox>([&](auto box) {
        constexpr int kFirst = box * Shared::kBoxColumns;
        ChannelScales<Out, Shared::kBox> scales[N / Shared::kColumns];
#pragma unroll
        for (int i = 0; i < N / Shared::kColumns; ++i) scales[i].read(channel_scale + i * Shared::kColumns + kFirst);
        unrolled<kBlocks>([&](auto b) {
          uint8_t* chunk = own_staging + staged++ % Shared::kChunks * Shared::kChunk;
          if constexpr (!Add) {
            if (leader) cute::tma_store_wait<Shared::kChunks - 1>();  // the copy engine has read what was there
            meet();
          }
          if constexpr (End::kGates) {
            auto stage = [&](auto with_bias, auto gate_second) {
              stage_gated<typename End::Act, with_bias, gate_second, Out, N, Shared::kBox, kFirst>(chunk, d[b], scale[b], scales, channel_bias);
            };
            constexpr std::true_type yes;
            constexpr std::false_type no;
            if (has_bias) {
              end.gate_second ? stage(yes, yes) : stage(yes, no);
            } else {
              end.gate_second ? stage(no, yes) : stage(no, no);
            }
          } else if (has_bias) {
            stage_output<true, Add, Out, N, Shared::kBox, kFirst>(chunk, d[b], scale[b], scales[0], channel_bias);
          } else {
            stage_output<false, Add, Out, N, Shared::kBox, kFirst>(chunk, d[b], scale[b], scales[0], channel_bias);
          }
          cute::tma_store_fence();
          meet();
          if (leader) {
            cute::SM90_TMA_STORE_2D::copy(&product.out, chunk, tile.channel + kFirst, row0 + b * 64);
            cute::tma_store_arrive();
          }
        });
      });
    }
    if (leader) cute::tma_store_wait<0>();
  }
  if (ctas > 1) {  // no CTA leaves while another may still arrive at its barriers
    cute::cluster_arrive();
    cute::cluster_wait();
  }
}

// M × N tiles; `first`, `second` are the cluster's sizes along M and N.
template <typename EA, typename EB, typename Out, int M, int N, bool Pingpong, bool Exact, typename End_ = Store>
struct ScaledMmTile : ScaledMmEntries<ScaledMmTile<EA, EB, Out, M, N, Pingpong, Exact, End_>, EA, EB, Out> {
  using End = End_;
  static constexpr bool kStores = !End::kAdds && !End::kGates && !End::kRotates;
  using Shared = TileShared<Out, M, N, Pingpong, End>;
  static_assert(Shared::kRows % 64 == 0 && Shared::kColumns % 16 == 0 && N <= 256);
  static_assert(!End::kRotates || (N == kHead && sizeof(Out) == 2), "a head is a tile's columns, in two bytes each");

  static Boxes boxes(int64_t cluster_m, int64_t cluster_n) {
    const bool shared = cluster_m >= 1 && cluster_n >= 1 && cluster_m * cluster_n <= 8 && (!End::kGates || cluster_m <= 2);
    const bool fits = shared && N % (8 * cluster_m) == 0 && M % (8 * cluster_n) == 0;
    if (!fits) {
      TVM_FFI_THROW(ValueError) << "cluster: wanted at most 8 CTAs that divide the tile " << M << " x " << N << " in groups of 8 rows, found "
                                << cluster_m << " x " << cluster_n;
    }
    const int b_rows = End::kGates ? Shared::kColumns : static_cast<int>(N / cluster_m);
    return {static_cast<int>(M / cluster_n), b_rows, Shared::kColumns, 64, Shared::kBoxColumns, static_cast<int>(cluster_n)};
  }

  static void launch(const Products& products, int device, bool static_b, int cluster_m, int cluster_n,
                     const typename End::Params& end = {}) {
    const int ctas = cluster_m * cluster_n;
    TileParams p{products};
    p.tiles_m = static_cast<int>(ceil_div(products.m, M * cluster_m));
    p.tiles_n = products.tiles_n / cluster_n / (N / Shared::kColumns);
    p.group = std::max(1, 1024 / (M * cluster_m));
    p.cluster_m = cluster_m, p.cluster_n = cluster_n, p.static_b = static_b;
    auto* kernel = scaled_mm_tile_kernel<EA, EB, Out, M, N, Pingpong, Exact, End>;
    static OncePerDevice allowed;
    allowed.run(device, [&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::kBytes), "cudaFuncSetAttribute");
    });
    const int64_t wanted = static_cast<int64_t>(p.tiles_m) * p.tiles_n * ctas, room = sm_count(device) / ctas * ctas;
    Launch launch(static_cast<unsigned>(std::min(wanted, room)), kTileThreads);
    launch.stream(env_stream(device)).shared_memory(Shared::kBytes).programmatic();
    if (ctas > 1) launch.cluster(ctas);
    launch.run(kernel, p, end);
  }
};

}  // namespace inductor_ext
