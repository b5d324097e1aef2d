// Which tiles of attention there are: 128 queries of one head and one sequence each, or, where two heads read the same keys, 64 of
// both. Only the device knows the sequences' ends, so it lists the tiles itself.
//
// The list begins with the queries that come last in the longest sequences: under a causal mask those see most keys. CTAs take tiles
// in rounds, every other round backwards, so that each has about as much to do: taken round by round forwards, with 16 heads on 132
// SMs, some CTAs would have the last queries of every sequence and others the first.
#pragma once

#include "inductor_ext/launch.cuh"
#include "inductor_ext/tensor_map.cuh"
#include "varlen_attention/hopper_mma.cuh"

namespace inductor_ext {

constexpr int kAttentionRows = 64;  // queries of one head in a warpgroup's part of a tile

struct AttentionParams {
  CUtensorMap q, k, v;   // [B, S, H, D], or B = 1 and all sequences in S
  const int32_t* ends;   // [sequences + 1], of packed sequences; null: all are `length` long
  void* out;             // [rows, H, D]
  int sequences, length, rows;
  int heads, sharing;    // heads, and how many of them read the same keys
  int rows_of_tile, heads_of_tile;  // 128 and 1, or 64 and 2
  int left, right;       // keys that a query sees before and behind itself; kUnbounded
  float scale;           // of scores, times log2 e
  bool zero_rest;        // rows behind the last sequence become zero
};

constexpr int kUnbounded = 1 << 30;

struct AttentionTile {
  int rows;      // queries of a head; 0: there is no tile
  int head;      // the first one
  int first;     // the first query's position in its sequence
  int length;    // of the sequence
  int first_block, last_block;  // of keys
  int batch, token;  // where the sequence begins in q, k and v
  int out;       // row of the output
};

// By a whole warp. Tiles are asked for in growing order.
class AttentionTiles {
 public:
  __device__ __forceinline__ explicit AttentionTiles(const AttentionParams& p) : p_(p), lane_(threadIdx.x % 32) {
    int longest = p.ends == nullptr ? p.length : 0;
    for (int chunk = 0; p.ends != nullptr && chunk < p.sequences; chunk += 32) longest = max(longest, length_of(chunk + lane_));
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, mask));
    block_ = (longest + p.rows_of_tile - 1) / p.rows_of_tile - 1;
  }

  // The tile that this CTA takes in round `round`; one without rows when there are no more.
  __device__ __forceinline__ AttentionTile of_round(int round) {
    const int ctas = gridDim.x, cta = blockIdx.x;
    return find(round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta));
  }

 private:
  __device__ __forceinline__ int length_of(int sequence) const {
    if (sequence >= p_.sequences) return 0;
    return p_.ends == nullptr ? p_.length : p_.ends[sequence + 1] - p_.ends[sequence];
  }

  __device__ __forceinline__ AttentionTile find(int index) {
    while (block_ >= 0) {
      const int own_length = length_of(chunk_ + lane_);
      const unsigned there = __ballot_sync(~0u, own_length > block_ * p_.rows_of_tile);
      const int heads = p_.heads / p_.heads_of_tile, count = __popc(there) * heads;
      if (index < before_ + count) {
        const int which = (index - before_) / heads;
        const bool mine = (there >> lane_ & 1) != 0 && __popc(there & ((1u << lane_) - 1)) == which;
        const int from = __ffs(__ballot_sync(~0u, mine)) - 1;
        return tile(chunk_ + from, __shfl_sync(~0u, own_length, from), (index - before_ - which * heads) * p_.heads_of_tile);
      }
      before_ += count, chunk_ += 32;
      if (chunk_ >= p_.sequences) chunk_ = 0, --block_;
    }
    return {};
  }

  __device__ __forceinline__ AttentionTile tile(int sequence, int length, int head) const {
    AttentionTile t;
    const int start = p_.ends == nullptr ? 0 : p_.ends[sequence];
    t.head = head, t.length = length, t.first = block_ * p_.rows_of_tile;
    t.batch = p_.ends == nullptr ? sequence : 0, t.token = start;
    t.out = p_.ends == nullptr ? sequence * p_.length + t.first : start + t.first;
    const int rows = min(p_.rows_of_tile, length - t.first), last_row = t.first + rows - 1;
    t.rows = min(rows, p_.rows - t.out);
    t.first_block = max(t.first - p_.left, 0) / kAttentionKeys;
    t.last_block = min(last_row + p_.right, length - 1) / kAttentionKeys;
    return t;
  }

  const AttentionParams& p_;
  const int lane_;
  int block_;       // of queries, in each sequence that has as many
  int chunk_ = 0;   // of 32 sequences
  int before_ = 0;  // tiles before those of this block and chunk
};

}  // namespace inductor_ext
