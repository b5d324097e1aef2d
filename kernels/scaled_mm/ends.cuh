// What the tile family does with a tile of sums before it is stored.
//
//   Store            scales, bias, rounding
//   AddResidual      … and adds a residual [M, N]
//   Gate<Act>        … of gate's and up's channels, half a tile each, rounded: act(gate) * up, which is all that is stored
//   NormRope<Norm>   … and, to the heads of the first products (q and k): RMSNorm of each, if Norm is one, and rotate-half RoPE.
//                    A head is the N = 128 columns of a tile, so that a tile has all that its rows' means need.
#pragma once

#include <cstdint>

#include "inductor_ext/activation.cuh"
#include "inductor_ext/norm.cuh"
#include "inductor_ext/rope.cuh"
#include "inductor_ext/vec.cuh"

namespace inductor_ext {

struct NoParams {};

struct Store {
  static constexpr bool kAdds = false, kGates = false, kRotates = false, kNorms = false;
  using Params = NoParams;
};
struct AddResidual {
  static constexpr bool kAdds = true, kGates = false, kRotates = false, kNorms = false;
  using Params = NoParams;
};

// A tile of N columns has N / 2 of gate and N / 2 of up, so that a thread has both of a pair. To the copy engine they are one
// b [2, N, K], the first being the one that lies first in memory: two copies a stage instead of one took the same tiles from
// 79 to 89 us (7168 x 2 * 3072 x 1024 on an H200).
struct GateParams {
  bool gate_second;
};
template <typename Activation>
struct Gate {
  static constexpr bool kAdds = false, kGates = true, kRotates = false, kNorms = false;
  using Act = Activation;
  using Params = GateParams;
};

// Row t of the products is position t % sequence of sequence t / sequence. Tables are of the output's dtype.
struct RopeParams {
  const void* cos;
  const void* sin;
  int64_t cos_batch, cos_token, sin_batch, sin_token;  // elements
  const void* weight[2];  // [128], of q and of k
  uint32_t sequence;
  int products;  // that are rotated: the first ones
  float eps;
};

template <typename NormOfHeads>
struct NormRope {
  static constexpr bool kAdds = false, kGates = false, kRotates = true, kNorms = NormOfHeads::kNorm;
  using Norm = NormOfHeads;
  using Params = RopeParams;
};

constexpr int kHead = 128;  // columns

// A row of a head lies in the registers of four neighbouring lanes: columns 8 * j + 2 * (lane % 4) and the one
// after it in word j.
template <typename Out>
using HeadRow = Raw<Out, kHead / 4>;

// Both rows of a thread's, normalised in place. `weight`: all of the head's, in shared memory.
template <typename Norm, typename Out>
__device__ __forceinline__ void norm_heads(HeadRow<Out> (&rows)[2], const Out* weight, float eps) {
  HeadRow<Out> of;
#pragma unroll
  for (int j = 0; j < kHead / 8; ++j) of.words[j] = *reinterpret_cast<const uint32_t*>(weight + 8 * j + 2 * (threadIdx.x % 4));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float v[kHead / 4], sums[2] = {};  // two chains of additions
    rows[i].unpack(v);
#pragma unroll
    for (int e = 0; e < kHead / 4; ++e) sums[e % 2] = fmaf(v[e], v[e], sums[e % 2]);
    float sum = sums[0] + sums[1];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    normalise<Norm>(rows[i], rsqrtf(sum * (1.0f / kHead) + eps), of);
  }
}

// What a lane needs to rotate its share of the 16 rows that its warp has put into shared memory, low and high half of the head
// apart: 16 bytes, a piece, of each half of four rows.
template <typename Out>
struct RopeTables {
  static constexpr int kRows = 4, kPiece = 8;  // elements
  Raw<Out, kPiece> cos_low[kRows], cos_high[kRows], sin_low[kRows], sin_high[kRows];

  // Of 64 rows, those of the warp's 16.
  static __device__ __forceinline__ int row(int n) { return static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 8) + 4 * n; }
  static __device__ __forceinline__ int piece() { return threadIdx.x % 8; }

  // `first`: the row of the products that is row 0 here; rows from `rows` on get some other row's.
  __device__ __forceinline__ void read(const RopeParams& p, int first, int rows) {
    uint32_t batch = (first + row(0)) / p.sequence, token = (first + row(0)) - batch * p.sequence;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const bool inside = first + row(n) < rows;
      const uint32_t of_batch = inside ? batch : 0, of_token = inside ? token : 0;
      const Out* cos = static_cast<const Out*>(p.cos) + of_batch * p.cos_batch + of_token * p.cos_token + piece() * kPiece;
      const Out* sin = static_cast<const Out*>(p.sin) + of_batch * p.sin_batch + of_token * p.sin_token + piece() * kPiece;
      cos_low[n].load(cos), cos_high[n].load(cos + kHead / 2);
      sin_low[n].load(sin), sin_high[n].load(sin + kHead / 2);
      token += row(1) - row(0);
      while (token >= p.sequence) token -= p.sequence, ++batch;  // another division each would be most of this
    }
  }

  // place(half, row, piece): where a piece lies.
  template <typename Place>
  __device__ __forceinline__ void rotate(Place&& place) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      uint4* to[2] = {place(0, row(n), piece()), place(1, row(n), piece())};
      Raw<Out, kPiece> y[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 words = *to[half];
        y[half].words[0] = words.x, y[half].words[1] = words.y, y[half].words[2] = words.z, y[half].words[3] = words.w;
      }
      negate(sin_low[n]);
      const Raw<Out, kPiece> low = rotated<Out>(y[0], y[1], cos_low[n], sin_low[n]), high = rotated<Out>(y[1], y[0], cos_high[n], sin_high[n]);
      *to[0] = make_uint4(low.words[0], low.words[1], low.words[2], low.words[3]);
      *to[1] = make_uint4(high.words[0], high.words[1], high.words[2], high.words[3]);
    }
  }
};

}  // namespace inductor_ext
