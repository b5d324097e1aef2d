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

// One row of a head in the registers of four neighbouring lanes, 8 * j + 2 * (lane % 4) and the column after it in pair j:
// normalised in place. `weight`: all of the head's, in shared memory.
template <typename Norm, typename Out>
__device__ __forceinline__ void norm_head(Raw<Out, kHead / 4>& row, const float* weight, float eps) {
  float v[kHead / 4];
  row.unpack(v);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kHead / 4; ++i) sum = fmaf(v[i], v[i], sum);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  const float factor = rsqrtf(sum * (1.0f / kHead) + eps);
#pragma unroll
  for (int j = 0; j < kHead / 8; ++j) {
    const float2 of = *reinterpret_cast<const float2*>(weight + 8 * j + 2 * (threadIdx.x % 4));
    float pair[2] = {__fmul_rn(v[2 * j], factor), __fmul_rn(v[2 * j + 1], factor)};
    const float w[2] = {of.x, of.y};
    Norm::template apply<Out>(pair, w);
    row.words[j] = Raw<Out, 2>::pair(pair[0], pair[1]);
  }
}

// What a thread needs to rotate its share of 64 rows that lie in shared memory, low and high half of the head apart: 16 bytes, a
// piece, of each half of four rows. Read before the rows are there.
template <typename Out>
struct RopeTables {
  static constexpr int kRows = 4, kPiece = 8;  // elements
  Raw<Out, kPiece> cos_low[kRows], cos_high[kRows], sin_low[kRows], sin_high[kRows];

  static __device__ __forceinline__ int row(int n) { return static_cast<int>(threadIdx.x % 128) / 8 + 16 * n; }
  static __device__ __forceinline__ int piece() { return threadIdx.x % 8; }

  // `first`: the row of the products that is row 0 here; rows from `rows` on get some other row's.
  __device__ __forceinline__ void read(const RopeParams& p, int first, int rows) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const uint32_t token = min(first + row(n), rows - 1), batch = token / p.sequence, at = token - batch * p.sequence;
      const Out* cos = static_cast<const Out*>(p.cos) + batch * p.cos_batch + at * p.cos_token + piece() * kPiece;
      const Out* sin = static_cast<const Out*>(p.sin) + batch * p.sin_batch + at * p.sin_token + piece() * kPiece;
      cos_low[n].load(cos), cos_high[n].load(cos + kHead / 2);
      sin_low[n].load(sin), sin_high[n].load(sin + kHead / 2);
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
