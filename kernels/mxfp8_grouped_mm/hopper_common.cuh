// What the roles of mxfp8_grouped_mm's kernels for compute capability 9.0 share: a tile's sizes, the arguments, the schedule, the ring
// of stages. `hopper.cuh` is the kernel.
#pragma once

#include "inductor_ext/hopper.cuh"
#include "inductor_ext/tensor_map.cuh"
#include "mxfp8_grouped_mm/hopper_layout.cuh"
#include "mxfp8_grouped_mm/hopper_math.cuh"

namespace inductor_ext {

constexpr int kGroupedMaxStages = 16;
constexpr int kGroupedSharedOfTwo = 112 * 1024;  // bytes of shared memory for each of two CTAs of an SM
constexpr int kGroupedMaxExperts = 1024;
constexpr uint64_t kEvictFirst = 0x12F0000000000000;

// What a token is: bf16, or e4m3 with one fp32 scale for the row; that too where the four scales that a row of weights has of 128
// elements are the same, by contract.
enum class GroupedX { kBf16, kFp8, kFp8By128 };

template <GroupedX Kind, typename Out, int W, int N, int ClusterW, int ClusterN>
struct GroupedShape {
  static_assert(W == 64 || W == 128 || W == 256, "a tile is 64, 128 or 256 output channels");
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || (N == 256 && W == 128 && Kind == GroupedX::kBf16),
                "of 8 to 128 tokens, or 256 where the sums and a stage of them fit");
  static constexpr bool kBy128 = Kind == GroupedX::kFp8By128, kFp8 = kBy128 || Kind == GroupedX::kFp8;
  static constexpr int kSizeOfX = Kind == GroupedX::kBf16 ? 2 : 1;
  static constexpr int kGroups = W == 64 ? 1 : 2;                    // of consumers
  static constexpr int kBlocks = W / (kGroups * grouped::kGroupRows);  // of 64 rows that each has
  static constexpr int kCtas = W == 64 || (W == 128 && N <= 32) ? 2 : 1;  // of an SM
  static constexpr bool kMovesRegisters = kCtas == 1;  // from the producer, then a whole warpgroup, to the consumers
  static constexpr int kConsumers = kGroups * grouped::kGroupThreads;
  static constexpr int kThreads = kConsumers + (kMovesRegisters ? grouped::kGroupThreads : 32);
  // What a CTA starts with is all that it ever has, and asking for more hangs: of 65 536, as many as its threads get in eighths.
  static constexpr bool kManySums = Kind == GroupedX::kBf16 && W == 256 && N == 128;  // beside four wgmmas' weights, twice
  static constexpr int kConsumerRegisters = kFp8 ? 216 : kManySums ? 224 : 208;
  static constexpr int kProducerRegisters = kFp8 ? 72 : kManySums ? 56 : 88;
  static_assert(!kMovesRegisters || kConsumers * kConsumerRegisters + grouped::kGroupThreads * kProducerRegisters <=
                                        65536 / (8 * kThreads) * 8 * kThreads);
  // CTAs with neighbouring channels and the same tokens, or with neighbouring tokens and the same channels: what they share comes
  // once, each of them bringing a part of it to all.
  static constexpr int kClusterW = ClusterW, kClusterN = ClusterN, kCluster = ClusterW * ClusterN;
  static_assert(kCluster == 1 || (kCluster == 2 && kCtas == 1), "a cluster is two CTAs, each alone on an SM");
  static constexpr int kChannels = W, kColumns = N;    // of a CTA
  static constexpr int kBoxChannels = W / ClusterN;    // that one copy brings
  static constexpr int kBoxTokens = N <= 16 ? N : N <= 64 ? 16 : 32;  // that one copy brings: a tile of few tokens reads few
  static constexpr int kStageK = N == 256 ? grouped::kStageK / 2 : grouped::kStageK;
  static constexpr int kStageScales = kStageK / grouped::kBlock;  // of a row
  static constexpr int kWeights = W * kStageK;
  static constexpr int kTokens = N * kStageK * kSizeOfX;
  static constexpr int kStage = kWeights + kTokens;
  static constexpr int kScales = W * grouped::kScaleSlot + (kFp8 ? N * 4 : 0);  // bytes a stage
  static constexpr int kSize = static_cast<int>(sizeof(Out));
  static constexpr int kMostStaged = kSize == 2 ? 32 : 16;  // tokens of the output that are staged at a time
  static constexpr int kStagedTokens = N < kMostStaged ? N : kMostStaged;
  static constexpr int kStaged = kStagedTokens * grouped::staged_pitch(kSize);  // bytes of each group of consumers
  // Sets of registers for products that are not in the sums yet: two, where they fit beside the sums.
  static constexpr int kParts = (kBlocks + 2) * N / 2 <= 192 ? 2 : 1;
  static constexpr int kTogether = N < 128 || kManySums ? 4 : 2;  // wgmmas issued together: registers for two such sets of weights
  static constexpr int fixed(int experts) { return kGroups * kStaged + 2 * kGroupedMaxStages * 8 + (2 * experts + 1) * 4; }
  static constexpr int stages(int experts) {
    const int budget = kCtas == 2 ? kGroupedSharedOfTwo : kSharedLimit;
    const int fit = (budget - fixed(experts)) / (kStage + kScales);
    return fit < kGroupedMaxStages ? fit : kGroupedMaxStages;
  }
  static constexpr int bytes(int experts) { return stages(experts) * (kStage + kScales) + fixed(experts); }
  static_assert(kStage % 1024 == 0 && kScales % 16 == 0 && kStaged % 16 == 0);
  static_assert((kSharedLimit - kGroups * kStaged - 8192 - 512) / (kStage + kScales) >= 3, "the tile leaves no room for a pipeline");
};

struct GroupedParams {
  CUtensorMap w, x;
  const uint8_t* w_scale;  // [E, N, K / 32]
  const uint8_t* x_scale;  // fp32 [T], or null
  const int32_t* offs;
  void* out;
  int64_t out_pitch;  // elements
  int experts, tokens, channels, k;
  int stages;
  int group;          // tiles of tokens that are taken together
  bool whole_words;   // the four scales that a row has of a stage are one aligned word
};

// ---- the schedule -----------------------------------------------------------------------------------------------------------

struct GroupedTile {
  int expert, token, valid, channel;  // first token and channel; tokens of the tile
  bool alone;                         // the only tile of tokens that reads these weights
};

// In shared memory: the tiles before each expert and, at [experts], of all; each expert's end. A tile is a cluster's.
struct GroupedSchedule {
  int* first;
  int* ends;
  int experts, channel_tiles, group;

  // This CTA's part of tile `index`. By a whole warp. `expert` is the caller's place in the list, which only moves on.
  template <typename Shape>
  __device__ __forceinline__ GroupedTile tile(int index, int& expert) const {
    const int lane = threadIdx.x % 32;
    for (int passed = 32; passed == 32; expert += passed) {
      const int next = expert + 1 + lane;
      passed = __popc(__ballot_sync(~0u, next <= experts && first[next] <= index));
    }
    const int begin = expert > 0 ? ends[expert - 1] : 0, rows = grouped::rows_between(begin, ends[expert]);
    const int token_tiles = grouped::ceil_of(rows, Shape::kColumns * Shape::kClusterN);
    const grouped::Place place = grouped::place_of(index - first[expert], token_tiles, channel_tiles, group);
    const int token = grouped::first_of(place.token_tile, Shape::kColumns, Shape::kClusterN, blockIdx.x);
    const int channel = grouped::first_of(place.channel_tile, Shape::kChannels, Shape::kClusterW, blockIdx.x);
    return {expert, begin + token, min(max(rows - token, 0), Shape::kColumns), channel, token_tiles == 1};
  }

  // By one warp, after `ends` is there.
  template <int TileTokens>
  __device__ __forceinline__ void make() const {
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane;
      int count = 0;
      if (e < experts) count = grouped::tiles_of(grouped::rows_between(e > 0 ? ends[e - 1] : 0, ends[e]), TileTokens, channel_tiles);
      int sum = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += below;
      }
      if (e < experts) first[e] = before + sum - count;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) first[experts] = before;
  }
};

// The ring of stages as all roles see it.
struct GroupedRing {
  uint8_t* stages;
  uint8_t* scales;
  uint64_t* full;   // weights, tokens and scales are there
  uint64_t* empty;
  int count;
};

// A stage has been read, says each warp of consumers to all CTAs that brought something of it.
template <int Cluster>
struct Release {
  int lane = threadIdx.x % 32, leads = lane < Cluster;

  __device__ __forceinline__ Release() { keep(leads); }
  __device__ __forceinline__ void operator()(uint64_t* empty) const {
    if constexpr (Cluster == 1) {
      if (leads) EmptyBarrier::arrive(empty);
    } else {
      EmptyBarrier::arrive(empty, lane, leads);
    }
  }
};

// A stage's scales of a thread's rows of weights: two rows in each of its blocks of 64, four scales each.
template <int Blocks>
struct WeightScales {
  uint32_t words[Blocks][2], edges[Blocks][2];

  // `from`: the first row's slot in shared memory; `shift` and `there` are `scale_shift`'s and `scales_there`'s.
  __device__ __forceinline__ void read(const uint8_t* from, int shift, uint32_t there) {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint2 slot = *reinterpret_cast<const uint2*>(from + (b * grouped::kGroupRows + 8 * i) * grouped::kScaleSlot);
        words[b][i] = grouped::scales_in(slot.x, slot.y, shift) & there;
        edges[b][i] = grouped::edges_of(words[b][i]);
      }
    }
  }
  // Of 32 elements of K, as two equal bf16.
  __device__ __forceinline__ uint32_t factor(int b, int i, int which) const { return grouped::factor_in(words[b][i], edges[b][i], which); }
  __device__ __forceinline__ float scale(int b, int i, int which) const { return upper(factor(b, i, which)); }
};

// The same where the four of a row are one: the first, which is in the first of its slot's words wherever it begins.
template <int Blocks>
struct SharedScales {
  float scales[Blocks][2];

  __device__ __forceinline__ void read(const uint8_t* from, int shift) {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(from + (b * grouped::kGroupRows + 8 * i) * grouped::kScaleSlot);
        scales[b][i] = upper(grouped::factor_of(word >> shift & 0xff));
      }
    }
  }
  __device__ __forceinline__ float scale(int b, int i, int) const { return scales[b][i]; }
};

}  // namespace inductor_ext
