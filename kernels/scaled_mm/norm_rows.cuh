// Rows that the CTAs of a cluster hold kHead columns each of (`AddNorm`): what they tell each other, the norm, and FP8 of it.
//
// A consumer has each row in the registers of four lanes (`HeadRow`), and needs two numbers of all of it: the sum of its squares
// and the maximum of what the norm makes of it. For each of them every CTA sends its own part of every row to every CTA, itself
// included, whose barrier counts the bytes. All of them add those parts up in one order, so that they go on with the same bits.
//
// Slots need no second copy. The two exchanges alternate, and a quad sends its part of one after it has read its slots of the other:
// who has every part of one knows that all CTAs have read the other, and that its round of every barrier is over. What it sends
// next of that other one can neither overwrite a part that someone still reads nor count towards an earlier round.
#pragma once

#include "inductor_ext/fp8.cuh"
#include "inductor_ext/hopper.cuh"
#include "inductor_ext/reduce.cuh"
#include "scaled_mm/ends.cuh"

namespace inductor_ext {

constexpr int kMaxCluster = 8;          // CTAs: more is not portable
constexpr int kQuads = kWarpgroup / 4;  // of a consumer, each with 2 rows a block of 64

// One exchange of one consumer, of Blocks · 64 rows.
template <int Blocks>
struct RowExchange {
  static constexpr int kWords = 2 * Blocks;  // of a quad
  static constexpr int kBytes = kMaxCluster * kQuads * kWords * 4;

  uint32_t* slots;    // [CTA][quad][word]
  uint64_t* barrier;  // for one arrival

  // By one thread, before it waits.
  __device__ __forceinline__ void expect(int ctas) const { FullBarrier::arrive_and_expect_tx(barrier, ctas * kQuads * kWords * 4); }

  // A word of each row; all four lanes of a quad have them, and send them to a quarter of the CTAs each.
  __device__ __forceinline__ void send(const uint32_t (&words)[kWords], int rank, int ctas) const {
#pragma unroll
    for (int i = 0; i < kMaxCluster / 4; ++i) {
      const int cta = threadIdx.x % 4 + 4 * i;
      if (cta < ctas) send_to(cta, at(rank), words, barrier);
    }
  }

  // Calls merge(words) for each CTA in turn.
  template <typename F>
  __device__ __forceinline__ void receive(int ctas, uint32_t phase, F&& merge) const {
    wait_for_cluster(barrier, phase);
    uint32_t words[kMaxCluster][kWords];
#pragma unroll
    for (int cta = 0; cta < kMaxCluster; ++cta) {
      if (cta >= ctas) continue;
      if constexpr (kWords == 4) {
        const uint4 found = *reinterpret_cast<const uint4*>(at(cta));
        words[cta][0] = found.x, words[cta][1] = found.y, words[cta][2] = found.z, words[cta][3] = found.w;
      } else {
        const uint2 found = *reinterpret_cast<const uint2*>(at(cta));
        words[cta][0] = found.x, words[cta][1] = found.y;
      }
    }
#pragma unroll
    for (int cta = 0; cta < kMaxCluster; ++cta) {
      if (cta < ctas) merge(words[cta]);
    }
  }

 private:
  __device__ __forceinline__ uint32_t* at(int cta) const {
    const int quad = static_cast<int>(threadIdx.x) % kWarpgroup / 4;
    return slots + (cta * kQuads + quad) * kWords;
  }
};

// This CTA's columns of each of a thread's rows: Σ x², as the bits of an fp32 number, in every lane of the quad.
template <typename Out, int Blocks>
__device__ __forceinline__ void sums_of_squares(const HeadRow<Out> (&rows)[Blocks][2], uint32_t (&sums)[2 * Blocks]) {
#pragma unroll
  for (int r = 0; r < 2 * Blocks; ++r) {
    float v[kHead / 4], parts[2] = {};  // two chains of additions
    rows[r / 2][r % 2].unpack(v);
#pragma unroll
    for (int e = 0; e < kHead / 4; ++e) parts[e % 2] = fmaf(v[e], v[e], parts[e % 2]);
    sums[r] = __float_as_uint(group_sum<4>(parts[0] + parts[1]));
  }
}

// Likewise max |x|.
template <typename Out, int Blocks>
__device__ __forceinline__ void maxima(const HeadRow<Out> (&rows)[Blocks][2], uint32_t (&bits)[2 * Blocks]) {
#pragma unroll
  for (int r = 0; r < 2 * Blocks; ++r) {
    Amax<Out> amax;
    amax.merge(rows[r / 2][r % 2]);
    bits[r] = group_max<4>(amax.float_bits());
  }
}

// scale_program(max |y|) of a row.
template <typename End>
__device__ __forceinline__ float scale_of_row(uint32_t bits, const Consts& consts) {
  using Program = typename End::ScaleProgram;
  const Env env{consts, nullptr};
  float scale[1] = {__uint_as_float(bits)};
  Program::apply(Program::prepare(env), scale);
  return scale[0];
}

// A thread's share of one row in FP8, by its scale. store(column, bytes): of a column and the one after it.
template <typename End, typename Out, typename F>
__device__ __forceinline__ void quantise_row(const HeadRow<Out>& row, float scale, const Consts& consts, F&& store) {
  using Chain = typename End::Chain;
  Env env{consts, nullptr};
  env.scale = scale;
  const auto prepared = Chain::prepare(env);
  constexpr int kWords = 4;  // two elements each, at a time
#pragma unroll
  for (int j = 0; j < kHead / 8; j += kWords) {
    Raw<Out, 2 * kWords> part;
#pragma unroll
    for (int n = 0; n < kWords; ++n) part.words[n] = row.words[j + n];
    float v[2 * kWords];
    part.unpack(v);
    Chain::apply(prepared, v);
    const auto bytes = cast_fp8<typename End::Fp8, End::kSaturated>(v);
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      store(8 * (j + n) + 2 * static_cast<int>(threadIdx.x % 4), static_cast<uint16_t>(bytes.words[n / 2] >> (16 * (n % 2))));
    }
  }
}

// Where the rows of a consumer's tile are.
struct RowsAt {
  int first, count;  // of this tile, and of all: those from `count` on are not stored
  int rank, ctas;    // in the cluster
  uint32_t phase;    // of both exchanges
};

// The sum of a tile, by a consumer: its scales go to memory, its FP8 to place(block, row of it, column). free_place() returns when that
// is free, to all threads together.
template <typename End, typename Out, int Blocks, typename Free, typename Place>
__device__ __forceinline__ void norm_and_quantise(HeadRow<Out> (&rows)[Blocks][2], const Out* weight, const AddNormParams& p, const RowsAt& at,
                                                  const RowExchange<Blocks>& sums, const RowExchange<Blocks>& maximums, Free&& free_place,
                                                  Place&& place) {
  constexpr int kRows = 2 * Blocks;  // of a thread
  const int thread = threadIdx.x % kWarpgroup;
  if (thread == 0) sums.expect(at.ctas), maximums.expect(at.ctas);
  uint32_t own[kRows];
  float sum[kRows] = {};
  sums_of_squares<Out>(rows, own);
  sums.send(own, at.rank, at.ctas);
  sums.receive(at.ctas, at.phase, [&](const uint32_t(&part)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += __uint_as_float(part[r]);
  });
  const HeadRow<Out> of = head_weight_of(weight);
#pragma unroll
  for (int r = 0; r < kRows; ++r) normalise<typename End::Norm>(rows[r / 2][r % 2], rsqrtf(sum[r] * p.per_column + p.eps), of);
  maxima<Out>(rows, own);
  maximums.send(own, at.rank, at.ctas);
  free_place();
  uint32_t most[kRows] = {};
  maximums.receive(at.ctas, at.phase, [&](const uint32_t(&part)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) most[r] = max(most[r], part[r]);
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int in_block = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8, row = at.first + r / 2 * 64 + in_block;
    const float scale = scale_of_row<End>(most[r], p.consts);
    if (at.rank == 0 && thread % 4 == 0 && row < at.count) {
      static_cast<typename End::ScaleT*>(p.row_scale)[row] = narrow<typename End::ScaleT>(scale);
    }
    quantise_row<End, Out>(rows[r / 2][r % 2], scale, p.consts, [&](int column, uint16_t bytes) {
      *reinterpret_cast<uint16_t*>(place(r / 2, in_block, column)) = bytes;
    });
  }
}

}  // namespace inductor_ext
