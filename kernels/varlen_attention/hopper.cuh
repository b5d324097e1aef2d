// varlen_attention for compute capability 9.0: the algorithm of FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608) but for the
// order of its softmax, on batches and on packed sequences, for heads of 64 and 128.
//
// A persistent, warp-specialised kernel. One warp lists the tiles (`hopper_tiles.cuh`) and brings queries, keys and values through
// the copy engine; two warpgroups have 64 queries each of a tile. A block's scores are asked for together with the sum of values of
// the block before it; while the tensor cores compute both, the other warpgroup has its softmax. Blocks are taken from the last to
// the first: those that a mask cuts come first, and keys behind the end of the sequence among them. The queries of the next tile
// come while this one is computed, and its output leaves through the place of its queries.
//
// Not here, each measured on an H200 at 14 x 512 causal tokens of 16 and 8 heads of 128, 42 us: a softmax that is computed under the
// warpgroup's own products, as the paper has it (47 us, 45 with turns at asking for products); a tile's last sum asked for together
// with the next one's first scores (45 us); two heads of 64 queries to a tile (44 us).
//
// What lies behind a sequence is not its own: scores of such keys become -inf whatever they are, and such values zero before they
// are multiplied, since 0 · NaN of a neighbour would be NaN.
#pragma once

#include <cmath>

#include "inductor_ext/launch.cuh"
#include "inductor_ext/swizzle.cuh"
#include "inductor_ext/tensor.h"
#include "varlen_attention/hopper_mma.cuh"
#include "varlen_attention/hopper_tiles.cuh"

namespace inductor_ext {

constexpr int kAttentionThreads = 3 * kWarpgroup;

template <int D>
struct AttentionShared {
  static_assert(D == 64 || D == 128, "heads of 64 or 128");
  static constexpr int kBoxes = D / 64;
  static constexpr int kTile = kBoxes * kAttentionBox;  // of queries, keys or values
  static constexpr int kQueries = 2;
  static constexpr int kFixed = kQueries * (sizeof(AttentionTile) + 16) + 16 * 8;
  static constexpr int kFit = (kSharedLimit - kFixed) / kTile - kQueries;
  static constexpr int kStages = kFit < 8 ? kFit : 8;  // of keys or values
  static constexpr int kBytes = (kQueries + kStages) * kTile + kFixed;
  static_assert(kStages >= 4);
};

// ---- the softmax of a thread's two rows ---------------------------------------------------------------------------------------

// `highest` is of a whole row, `sum` of this thread's columns.
struct RowState {
  float highest[2], sum[2];
};

// Scores become -inf where `seen(column - own)` of a row is not: a thread's columns are those of `Wgmma`, `own` and 8 * j + e more.
template <int Keys, typename Seen>
__device__ __forceinline__ void hide(float (&s)[kAttentionKeys / 2], Seen&& seen) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& each = s[4 * j + 2 * i + e];
        each = seen(i, 8 * j + e) ? each : -INFINITY;
      }
    }
  }
}

// Scores become weights, not divided by their sum. `shrink`: by what sums so far are to be multiplied.
template <int Keys, bool First>
__device__ __forceinline__ void soften(float (&s)[kAttentionKeys / 2], RowState& rows, float (&shrink)[2], float scale) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float highest = First ? -INFINITY : rows.highest[i];
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) highest = fmaxf(highest, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    const float base = highest == -INFINITY ? 0.f : highest * scale;  // of a row that has seen no key yet
    shrink[i] = First ? 0.f : exp2_approximate(fmaf(rows.highest[i], scale, -base));
    rows.highest[i] = highest;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& each = s[4 * j + 2 * i + e];
        each = exp2_approximate(fmaf(each, scale, -base));
        sum += each;
      }
    }
    rows.sum[i] = First ? sum : fmaf(rows.sum[i], shrink[i], sum);
  }
}

template <typename Elem, int Keys>
__device__ __forceinline__ void round_weights(Weights& p, const float (&s)[kAttentionKeys / 2]) {
  Elem* tag = nullptr;
#pragma unroll
  for (int step = 0; step < Keys / 16; ++step) {
#pragma unroll
    for (int high = 0; high < 2; ++high) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* pair = s + 4 * (2 * step + high) + 2 * i;
        p[step][2 * high + i] = pack(tag, pair[0], pair[1]);
      }
    }
  }
#pragma unroll
  for (int step = Keys / 16; step < kAttentionSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[step][i] = 0;
  }
}

// The same in all lanes, as the compiler then knows: branches that depend on it may have wgmmas in them.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ AttentionTile uniform(const AttentionTile& tile) {
  return {uniform(tile.rows), uniform(tile.head), uniform(tile.first), uniform(tile.length), uniform(tile.first_block),
          uniform(tile.last_block), uniform(tile.batch), uniform(tile.token), uniform(tile.out)};
}

// ---- a warpgroup of consumers -------------------------------------------------------------------------------------------------

struct AttentionRing {  // of keys and values
  uint8_t* stages;
  uint64_t* full;
  uint64_t* empty;
};

template <typename Elem, int D>
class AttentionConsumer {
 public:
  using Shared = AttentionShared<D>;

  __device__ __forceinline__ AttentionConsumer(const AttentionParams& p, const AttentionRing& ring)
      : p_(p),
        ring_(ring),
        group_(uniform(threadIdx.x / kWarpgroup) - 1),
        head_(p.heads_of_tile > 1 ? group_ : 0),
        row_(p.heads_of_tile > 1 ? 0 : kAttentionRows * group_),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x % kWarpgroup / 32) {}

  // `queries`: of both warpgroups; the output is staged in their place.
  __device__ __forceinline__ void run(const AttentionTile& tile, uint8_t* queries) {
    if (tile.rows <= row_) return skip(tile);
    uint8_t* own = queries + kAttentionRows * 128 * group_;
    // Of the last block, a warpgroup whose queries see no more takes only half.
    const int last_key = min(tile.first + row_ + kAttentionRows - 1 + p_.right, tile.length - 1);
    if (last_key - tile.last_block * kAttentionKeys < 64) {
      begin<64>(tile, own);
    } else {
      begin<128>(tile, own);
    }
    clear_behind(tile);
    for (int block = tile.last_block - 1; block >= tile.first_block; --block) step(tile, own, block);
    finish(tile, own);
  }

 private:
  // ---- stages of keys and values

  __device__ __forceinline__ Slot take() {
    const Slot taken = slot_;
    slot_.advance(Shared::kStages);
    return taken;
  }
  __device__ __forceinline__ uint8_t* stage(const Slot& slot) const {
    FullBarrier::wait(ring_.full + slot.index, slot.phase);
    return ring_.stages + slot.index * Shared::kTile;
  }
  __device__ __forceinline__ void release(const Slot& slot) const {
    if (lane_ == 0) EmptyBarrier::arrive(ring_.empty + slot.index);
  }

  // Nothing of the tile is this warpgroup's; its stages are freed once they are there, like any others.
  __device__ __forceinline__ void skip(const AttentionTile& tile) {
    for (int i = 2 * (tile.last_block - tile.first_block + 1); i > 0; --i) {
      const Slot slot = take();
      stage(slot);
      release(slot);
    }
  }

  // ---- products

  using Part = float[kAttentionKeys / 2];  // of scores

  template <int Keys>
  __device__ __forceinline__ void ask_scores(Part& s, const uint8_t* q, const uint8_t* k) const {
    fence_registers(s);
    cute::warpgroup_arrive();
    Scores<Elem, D, Keys>::issue(q, k, s);
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void ask_sum(const uint8_t* v) {
    fence_registers(o_);
    fence_registers(weights_);
    cute::warpgroup_arrive();
    WeightedSum<Elem, D>::issue(weights_, v, o_);
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void sum_is_there() {
    fence_registers(o_);
    fence_registers(weights_);
  }

  // The last block's scores and weights.
  template <int Keys>
  __device__ __forceinline__ void begin(const AttentionTile& tile, const uint8_t* queries) {
    Part s;
    const Slot keys = take();
    ask_scores<Keys>(s, queries, stage(keys));
    cute::warpgroup_wait<0>();
    fence_registers(s);
    release(keys);
    hide_unseen<Keys>(s, tile, tile.last_block);
    float shrink[2];
    soften<Keys, true>(s, rows_, shrink, p_.scale);
    round_weights<Elem, Keys>(weights_, s);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o_[i] = 0.f;
  }

  // The scores of `block`, and the sum of the block behind it.
  __device__ __forceinline__ void step(const AttentionTile& tile, const uint8_t* queries, int block) {
    Part s;
    const Slot keys = take(), values = take();
    ask_scores<kAttentionKeys>(s, queries, stage(keys));
    ask_sum(stage(values));
    cute::warpgroup_wait<1>();
    fence_registers(s);
    release(keys);
    hide_unseen<kAttentionKeys>(s, tile, block);
    cute::warpgroup_wait<0>();
    sum_is_there();
    release(values);
    float shrink[2];
    soften<kAttentionKeys, false>(s, rows_, shrink, p_.scale);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o_[i] *= shrink[i / 2 % 2];
    round_weights<Elem, kAttentionKeys>(weights_, s);
  }

  // The sum of the first block, and the output.
  __device__ __forceinline__ void finish(const AttentionTile& tile, uint8_t* staging) {
    const Slot values = take();
    ask_sum(stage(values));
    float share[2];  // what the sums of a row are multiplied by in the end
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = rows_.sum[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      share[i] = 1.f / sum;
    }
    cute::warpgroup_wait<0>();
    sum_is_there();
    release(values);
    cutlass::arch::NamedBarrier::sync(kWarpgroup, group_);  // no warp's scores read the queries any more
    store(tile, staging, share);
  }

  template <int Keys>
  __device__ __forceinline__ void hide_unseen(Part& s, const AttentionTile& tile, int block) const {
    const int at = block * kAttentionKeys, first = tile.first + row_;
    const int row = first + warp_ * 16 + lane_ / 4 - at - 2 * (lane_ % 4);  // from this thread's first column
    const int end = tile.length - at - 2 * (lane_ % 4);
    if (at + Keys > min(first + p_.right + 1, tile.length)) {
      const int above[2] = {min(row + p_.right + 1, end), min(row + 8 + p_.right + 1, end)};
      hide<Keys>(s, [&](int i, int column) { return column < above[i]; });
    }
    if (at < first + kAttentionRows - 1 - p_.left) {
      const int below[2] = {row - p_.left, row + 8 - p_.left};
      hide<Keys>(s, [&](int i, int column) { return column >= below[i]; });
    }
  }

  // ---- the output

  __device__ __forceinline__ void store(const AttentionTile& tile, uint8_t* staging, const float (&share)[2]) const {
    Elem* tag = nullptr;
    auto place = [&](int row, int piece) {  // 16 bytes, swizzled
      return in_chunk<128>(staging + piece / 8 * kAttentionBox, row, piece % 8 * 16);
    };
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float* pair = o_ + 4 * (j + n / 2) + 2 * (n % 2);
        words[n] = pack(tag, pair[0] * share[n % 2], pair[1] * share[n % 2]);
      }
      const int matrix = lane_ / 8, row = warp_ * 16 + lane_ % 8 + 8 * (matrix & 1);
      cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3],
                                    *reinterpret_cast<cute::uint128_t*>(place(row, j + (matrix >> 1))));
    }
    __syncwarp();
    constexpr int kPieces = D / 8;
    const int rows = tile.rows - row_;
    Elem* out = static_cast<Elem*>(p_.out) + (static_cast<int64_t>(tile.out + row_) * p_.heads + tile.head + head_) * D;
#pragma unroll
    for (int n = 0; n < 16 * kPieces / 32; ++n) {
      const int row = warp_ * 16 + (n * 32 + lane_) / kPieces, piece = lane_ % kPieces;
      if (row < rows) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * p_.heads * D + piece * 8) = *reinterpret_cast<const uint4*>(place(row, piece));
      }
    }
  }

  // Values of keys behind the sequence become zero. Both warpgroups do it, each before it reads them.
  __device__ __forceinline__ void clear_behind(const AttentionTile& tile) const {
    const int keys = tile.length - tile.last_block * kAttentionKeys;
    if (keys >= kAttentionKeys) return;
    Slot values = slot_;
    if (tile.last_block > tile.first_block) values.advance(Shared::kStages);  // keys are before them
    uint8_t* v = stage(values);
#pragma unroll
    for (int box = 0; box < Shared::kBoxes; ++box) {
      for (int at = keys * 128 + static_cast<int>(threadIdx.x % kWarpgroup) * 16; at < kAttentionBox; at += kWarpgroup * 16) {
        *reinterpret_cast<uint4*>(v + box * kAttentionBox + at) = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kWarpgroup, group_);
  }

  const AttentionParams& p_;
  const AttentionRing ring_;
  const int group_, head_, row_;  // of the warpgroup; its head and its first row of a tile
  const int lane_, warp_;
  Slot slot_;
  RowState rows_;
  float o_[D / 2];   // sums of values
  Weights weights_;  // of the block whose values come next
};

// ---- the kernel ---------------------------------------------------------------------------------------------------------------

template <typename Elem, int D>
__global__ void __launch_bounds__(kAttentionThreads, 1) varlen_attention_kernel(const __grid_constant__ AttentionParams p) {
  using Shared = AttentionShared<D>;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* stages = shared + Shared::kQueries * Shared::kTile;
  uint64_t* full = reinterpret_cast<uint64_t*>(stages + Shared::kStages * Shared::kTile);
  uint64_t* empty = full + Shared::kStages;
  uint64_t* q_full = empty + Shared::kStages;
  uint64_t* q_empty = q_full + Shared::kQueries;
  AttentionTile* tiles = reinterpret_cast<AttentionTile*>(q_empty + Shared::kQueries);
  const int group = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v}) cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    constexpr int kReaders = 8;  // warps
    for (int s = 0; s < Shared::kStages; ++s) FullBarrier::init(full + s, 1), EmptyBarrier::init(empty + s, kReaders);
    for (int s = 0; s < Shared::kQueries; ++s) FullBarrier::init(q_full + s, 1), EmptyBarrier::init(q_empty + s, kReaders);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_kernel();

  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<56>();
    if (threadIdx.x >= 32) return;
    AttentionTiles list(p);
    Slot slot, queries;
    slot.phase = queries.phase = 1;  // the first time round all are free
    auto bring = [&](const CUtensorMap& map, uint64_t* barrier, uint8_t* to, int head, int token, int batch) {
#pragma unroll
      for (int box = 0; box < Shared::kBoxes; ++box) load_tile(&map, barrier, to + box * kAttentionBox, box * 64, head, token, batch);
    };
    const int second_head = p.heads_of_tile > 1 ? 1 : 0, second_row = p.heads_of_tile > 1 ? 0 : kAttentionRows;
    for (int round = 0;; ++round) {
      const AttentionTile tile = list.of_round(round);
      if (lane == 0) {
        EmptyBarrier::wait(q_empty + queries.index, queries.phase);
        tiles[queries.index] = tile;
        if (tile.rows == 0) {
          FullBarrier::arrive(q_full + queries.index);
        } else {
          FullBarrier::arrive_and_expect_tx(q_full + queries.index, Shared::kTile);
          uint8_t* to = shared + queries.index * Shared::kTile;
          const int token = tile.token + tile.first;
          bring(p.q, q_full + queries.index, to, tile.head, token, tile.batch);
          bring(p.q, q_full + queries.index, to + kAttentionRows * 128, tile.head + second_head, token + second_row, tile.batch);
          auto block = [&](const CUtensorMap& map, int which) {
            EmptyBarrier::wait(empty + slot.index, slot.phase);
            FullBarrier::arrive_and_expect_tx(full + slot.index, Shared::kTile);
            bring(map, full + slot.index, stages + slot.index * Shared::kTile, tile.head / p.sharing,
                  tile.token + which * kAttentionKeys, tile.batch);
            slot.advance(Shared::kStages);
          };
          block(p.k, tile.last_block);
          for (int which = tile.last_block - 1; which >= tile.first_block; --which) block(p.k, which), block(p.v, which + 1);
          block(p.v, tile.first_block);
        }
      }
      __syncwarp();
      queries.advance(Shared::kQueries);
      if (tile.rows == 0) break;
    }
    allow_next_kernel();
  } else {
    cutlass::arch::warpgroup_reg_alloc<224>();
    AttentionConsumer<Elem, D> consumer(p, {stages, full, empty});
    for (Slot queries;; queries.advance(Shared::kQueries)) {
      FullBarrier::wait(q_full + queries.index, queries.phase);
      const AttentionTile tile = uniform(tiles[queries.index]);
      if (tile.rows == 0) break;
      consumer.run(tile, shared + queries.index * Shared::kTile);
      cutlass::arch::fence_view_async_shared();  // what was staged, before the copy engine writes there
      __syncwarp();
      if (lane == 0) EmptyBarrier::arrive(q_empty + queries.index);
    }
    if (p.zero_rest) {
      const int64_t width = static_cast<int64_t>(p.heads) * D / 8, begin = p.ends[p.sequences] * width, end = p.rows * width;
      const int64_t thread = static_cast<int64_t>(blockIdx.x) * (2 * kWarpgroup) + threadIdx.x - kWarpgroup;
      uint4* out = static_cast<uint4*>(p.out);
      for (int64_t at = begin + thread; at < end; at += static_cast<int64_t>(gridDim.x) * (2 * kWarpgroup)) out[at] = make_uint4(0, 0, 0, 0);
    }
  }
}

template <typename Elem, int D>
struct VarlenAttention {
  // False where q, k or v lie as the copy engine cannot read them: nothing has been written then.
  static bool run(TensorView q, TensorView k, TensorView v, Optional<TensorView> ends, double scale, int64_t left, int64_t right, bool padded,
                  TensorView out) {
    const bool packed = ends.has_value();
    Symbol B("B"), S("S"), H("H"), Hkv("Hkv"), N("N + 1");
    Device device;
    if (packed) {
      TensorMatcher({S, H, D}).dtype<Elem>().strides({kAny, kAny, 1}).device(device).verify(q, "q");
      TensorMatcher({S, Hkv, D}).dtype<Elem>().strides({kAny, kAny, 1}).device(device).verify(k, "k");
      TensorMatcher({S, Hkv, D}).dtype<Elem>().strides({kAny, kAny, 1}).device(device).verify(v, "v");
      TensorMatcher({N}).dtype<int32_t>().contiguous().device(device).verify(*ends, "cu_seqlens");
      TensorMatcher({S, H, D}).dtype<Elem>().contiguous().device(device).verify(out, "out");
    } else {
      TensorMatcher({B, S, H, D}).dtype<Elem>().strides({kAny, kAny, kAny, 1}).device(device).verify(q, "q");
      TensorMatcher({B, S, Hkv, D}).dtype<Elem>().strides({kAny, kAny, kAny, 1}).device(device).verify(k, "k");
      TensorMatcher({B, S, Hkv, D}).dtype<Elem>().strides({kAny, kAny, kAny, 1}).device(device).verify(v, "v");
      TensorMatcher({B, S, H, D}).dtype<Elem>().contiguous().device(device).verify(out, "out");
    }
    if (Hkv.value() == 0 || H.value() % Hkv.value() != 0) {
      TVM_FFI_THROW(ValueError) << "q, k: wanted heads of q a multiple of those of k, found " << H.value() << " and " << Hkv.value();
    }
    if (out.numel() == 0) return true;
    AttentionParams p{};
    const bool described = describe(&p.q, q, kAttentionRows) && describe(&p.k, k, kAttentionKeys) && describe(&p.v, v, kAttentionKeys);
    if (!described || !aligned(data(out), 16)) return false;
    const int64_t batches = packed ? 1 : B.value();
    p.ends = packed ? data<const int32_t>(*ends) : nullptr;
    p.out = data(out);
    p.sequences = static_cast<int>(packed ? N.value() - 1 : batches);
    p.length = static_cast<int>(S.value()), p.rows = static_cast<int>(batches * S.value());
    p.heads = static_cast<int>(H.value()), p.sharing = static_cast<int>(H.value() / Hkv.value());
    // Two heads of sequences that are no longer than a warpgroup's part on average: else the second warpgroup would have nothing
    // to do (64 sequences of 16: 21 to 15 us on an H200). Longer ones read their keys and values more often so, and lose; and a
    // tile of each head is faster where there is a multiprocessor for it (one sequence of 16: 3.8 us, not 4.8).
    const int64_t room = sm_count(device.id());
    const bool is_short = p.rows <= kAttentionRows * p.sequences, are_many = static_cast<int64_t>(p.sequences) * p.heads > room;
    p.heads_of_tile = p.sharing % 2 == 0 && is_short && are_many ? 2 : 1, p.rows_of_tile = 2 * kAttentionRows / p.heads_of_tile;
    p.left = left < 0 ? kUnbounded : static_cast<int>(std::min<int64_t>(left, kUnbounded));
    p.right = right < 0 ? kUnbounded : static_cast<int>(std::min<int64_t>(right, kUnbounded));
    p.scale = static_cast<float>(scale * 1.4426950408889634);
    p.zero_rest = packed && padded;

    DeviceGuard guard(device.id());
    using Shared = AttentionShared<D>;
    auto* kernel = varlen_attention_kernel<Elem, D>;
    static OncePerDevice allowed;
    allowed.run(device.id(), [&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::kBytes), "cudaFuncSetAttribute");
    });
    const int64_t blocks = packed ? S.value() / p.rows_of_tile + p.sequences : batches * ceil_div(S.value(), p.rows_of_tile);
    const int64_t most = std::max<int64_t>(blocks * p.heads / p.heads_of_tile, 1);  // rows behind the last sequence need a CTA too
    Launch launch(static_cast<unsigned>(std::min<int64_t>(most, room)), kAttentionThreads);
    launch.stream(env_stream(device.id())).shared_memory(Shared::kBytes).programmatic().run(kernel, p);
    return true;
  }

 private:
  // [B, S, H, D] or [S, H, D].
  static bool describe(CUtensorMap* map, const TensorView& x, int rows_of_box) {
    const int from = x.ndim() - 3;
    std::array<int64_t, 4> sizes{D, x.shape()[from + 1], x.shape()[from], from > 0 ? x.shape()[0] : 1};
    std::array<int64_t, 3> pitches{};
    for (int i = 0; i < 3; ++i) {
      const int dim = from + 1 - i;
      const int64_t pitch = sizes[i + 1] == 1 ? D * int64_t{sizeof(Elem)} : x.strides()[dim] * int64_t{sizeof(Elem)};
      if (pitch <= 0 || pitch % 16 != 0 || pitch >= int64_t{1} << 40) return false;
      pitches[i] = pitch;
    }
    if (!aligned(data(x), 16)) return false;
    encode<4>(map, MapType<Elem>::value, sizeof(Elem), data(x), sizes, pitches, {64, 1, rows_of_box, 1});
    return true;
  }
};

}  // namespace inductor_ext
