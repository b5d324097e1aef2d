// RMSNorm of each head of q and k, if the model has it, and RoPE, both tensors in one launch.
//
//   y   = norm(x * rsqrt(mean(x²) + eps), weight), rounded to x's dtype; x itself without a norm
//   out = y * cos + (-y[R/2:R], y[:R/2]) * sin, y[R:]        each product and the sum rounded to T, the wider dtype of x and cos
//         or the same with (-y[1], y[0], -y[3], y[2], …), by pairs: rope.cuh's Turn says which
//
//   q [B, S, H, D], k [B, S, Hkv, D] or none, unit last stride; cos, sin [1 or B, S, R or R/2], unit last stride; weights [D]
//   or cos [1 or B, S, R/2, 2], which has cos and sin in turn, as complex numbers are; sin is not read then
//   q_out [B, S, H, D], k_out [B, S, Hkv, D] contiguous.   R even, by pairs a multiple of 4; 2 <= R <= D <= 256, D even
//
// A group of L lanes takes up to N heads of one token. A lane holds the same elements of both halves of what is turned of a head,
// so that rotating needs no other lane, and reads its cos, sin and weights once for all its heads.
#pragma once

#include <tvm/ffi/function.h>

#include "inductor_ext/launch.cuh"
#include "inductor_ext/norm.cuh"
#include "inductor_ext/reduce.cuh"
#include "inductor_ext/rope.cuh"
#include "inductor_ext/tensor.h"
#include "inductor_ext/vec.cuh"

namespace inductor_ext {

struct QkSide {  // q or k
  const void* x;
  void* out;
  const void* weight;
  int64_t batch, token, head;  // strides of x
  uint32_t heads, parts;       // parts: groups of lanes that a token's heads take
};

struct QkNormRopeParams {
  QkSide side[2];
  const void* cos;
  const void* sin;
  int64_t cos_batch, cos_token, sin_batch, sin_token;
  uint32_t groups, sequence;  // groups: tokens * (parts of q + parts of k)
  int half;                   // R / 2
  float eps, per_column;      // 1 / D
  int width;                  // D
};

// y * cos + other * sin to memory.
template <typename In, typename Table, typename Out, int N>
__device__ __forceinline__ void rotate(const Raw<In, N>& y, const Raw<In, N>& other, const Raw<Table, N>& cos, const Raw<Table, N>& sin,
                                       Out* out) {
  store_half(rotated<Out>(y, other, cos, sin), out);
}

constexpr int kQkBlock = 128;

// Nothing but the two results. What a call stores besides is a type of this kind, whose blocks are the grid's first.
struct NoStore {
  static constexpr bool kStores = false;
  using Params = QkNormRopeParams;
};

// D, of Params that have all of it.
template <typename Turn>
__device__ __forceinline__ int head_width(const QkNormRopeParams& p) {
  return Turn::kPartial ? p.width : 2 * p.half;
}

struct NoRest {
  __device__ __forceinline__ float squares(float sum) const { return sum; }
};

// The columns of a head behind the R that are turned: up to 2 * U vectors a lane, which are normalised and handed on.
template <typename In, typename W, typename Norm, int L, int E, int U>
struct SomeRest {
  static constexpr int kVectors = 2 * U;
  Raw<In, E> x[kVectors];
  Raw<W, E> weight[Norm::kNorm ? kVectors : 1];

  static __device__ __forceinline__ int column(const QkNormRopeParams& p, int v, int lane) { return 2 * p.half + (v * L + lane) * E; }
  // `from` is the head's first element; where the vectors lie apart element by element is `apart`.
  __device__ __forceinline__ void load(const In* from, const W* numbers, const QkNormRopeParams& p, int lane, bool there,
                                       bool apart = false) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = column(p, v, lane);
      x[v].zero();
      if constexpr (Norm::kNorm) weight[v].zero();
      if (!there || i >= p.width) continue;
      apart ? load_apart(x[v], from + i) : load_half(x[v], from + i);
      if constexpr (Norm::kNorm) load_half(weight[v], numbers + i);
    }
  }
  __device__ __forceinline__ float squares(float sum) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float a[E];
      x[v].unpack(a);
#pragma unroll
      for (int e = 0; e < E; ++e) sum = fmaf(a[e], a[e], sum);
    }
    return sum;
  }
  // Normalises in place where there is a norm.
  __device__ __forceinline__ void finish(float factor) {
    if constexpr (Norm::kNorm) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) normalise<Norm>(x[v], factor, weight[v]);
    }
  }
  template <typename Out>
  __device__ __forceinline__ Raw<Out, E> at(int v) const {
    if constexpr (std::is_same_v<In, Out>) {
      return x[v];
    } else {
      float a[E];
      Raw<Out, E> out;
      x[v].unpack(a), out.pack(a);
      return out;
    }
  }
  template <typename Out>
  __device__ __forceinline__ void store(Out* to, float factor, const QkNormRopeParams& p, int lane) {
    finish(factor);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = column(p, v, lane);
      if (i < p.width) store_half(at<Out>(v), to + i);
    }
  }
};

template <typename Turn, typename In, typename W, typename Norm, int L, int E, int U>
using Rest = std::conditional_t<Turn::kPartial, SomeRest<In, W, Norm, L, E, U>, NoRest>;

// L lanes hold a half of a head as U vectors of E elements each; N heads in flight.
template <typename In, typename W, typename Table, typename Out, typename Norm, int L, int E, int U, int N, typename Store = NoStore,
          typename Turn = Halves>
__global__ void __launch_bounds__(kQkBlock) qk_norm_rope_kernel(const __grid_constant__ typename Store::Params p) {
  const int lane = threadIdx.x % L;
  uint32_t group = blockIdx.x * (kQkBlock / L) + threadIdx.x / L;
  if constexpr (Store::kStores) {
    if (blockIdx.x < p.store_blocks) return Store::template run<Norm, W, Table, L, E, U, Turn>(p);
    group -= p.store_blocks * (kQkBlock / L);
  }
  const bool active = group < p.groups;
  const uint32_t parts = p.side[0].parts + p.side[1].parts;
  const uint32_t from_end = active ? p.groups - 1 - group : 0;  // what the product ahead wrote last is still in L2
  const uint32_t token = from_end / parts, part = from_end - token * parts;
  const uint32_t batch = token / p.sequence, at = token - batch * p.sequence;
  const bool of_k = part >= p.side[0].parts;
  const QkSide& side = p.side[of_k];
  const uint32_t first = (of_k ? part - p.side[0].parts : part) * N;
  const In* x = static_cast<const In*>(side.x) + batch * side.batch + at * side.token + first * side.head;
  Out* out = static_cast<Out*>(side.out) + (static_cast<int64_t>(token) * side.heads + first) * head_width<Turn>(p);
  const Table* cos = static_cast<const Table*>(p.cos) + batch * p.cos_batch + at * p.cos_token;
  const Table* sin = static_cast<const Table*>(p.sin) + batch * p.sin_batch + at * p.sin_token;

  Raw<In, E> low[N][U], high[N][U];
  Raw<Table, E> cos_low[U], cos_high[U], sin_low[U], sin_high[U];
  Raw<W, E> weight_low[Norm::kNorm ? U : 1], weight_high[Norm::kNorm ? U : 1];
  Rest<Turn, In, W, Norm, L, E, U> rest[N];  // of the columns behind those that are turned
  wait_for_previous_kernel();
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = (u * L + lane) * E;
      low[n][u].zero(), high[n][u].zero();
      if (active && i < p.half && first + n < side.heads) {
        load_half(low[n][u], x + n * side.head + i), load_half(high[n][u], x + n * side.head + p.half + i);
      }
    }
    if constexpr (Turn::kPartial) {
      rest[n].load(x + n * side.head, static_cast<const W*>(side.weight), p, lane, active && first + n < side.heads);
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = (u * L + lane) * E;
    cos_low[u].zero(), cos_high[u].zero(), sin_low[u].zero(), sin_high[u].zero();
    if (active && i < p.half) {
      load_tables<Turn>(cos_low[u], cos_high[u], sin_low[u], sin_high[u], cos, sin, i, p.half);
    }
    if constexpr (Norm::kNorm) {
      const W* weight = static_cast<const W*>(side.weight);
      weight_low[u].zero(), weight_high[u].zero();
      if (active && i < p.half) load_half(weight_low[u], weight + i), load_half(weight_high[u], weight + p.half + i);
    }
  }
  allow_next_kernel();

  float factor[N];
  if constexpr (Norm::kNorm) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        float a[E], b[E];
        low[n][u].unpack(a), high[n][u].unpack(b);
#pragma unroll
        for (int e = 0; e < E; ++e) sum = fmaf(b[e], b[e], fmaf(a[e], a[e], sum));
      }
      factor[n] = rest[n].squares(sum);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) factor[n] = rsqrtf(group_sum<L>(factor[n]) * p.per_column + p.eps);
  }

#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int i = (u * L + lane) * E;
    negate_sin<Turn>(sin_low[u], sin_high[u], i);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if constexpr (Turn::kPairs) {  // all lanes: a neighbour may be another lane's
        if constexpr (Norm::kNorm) {
          normalise<Norm>(low[n][u], factor[n], weight_low[u]), normalise<Norm>(high[n][u], factor[n], weight_high[u]);
        }
        const Raw<In, E> low_other = neighbours(low[n][u]), high_other = neighbours(high[n][u]);
        if (!active || i >= p.half || first + n >= side.heads) continue;
        Out* to = out + n * head_width<Turn>(p) + i;
        rotate(low[n][u], low_other, cos_low[u], sin_low[u], to);
        rotate(high[n][u], high_other, cos_high[u], sin_high[u], to + p.half);
      } else {
        if (!active || i >= p.half || first + n >= side.heads) continue;
        if constexpr (Norm::kNorm) {
          normalise<Norm>(low[n][u], factor[n], weight_low[u]), normalise<Norm>(high[n][u], factor[n], weight_high[u]);
        }
        Out* to = out + n * head_width<Turn>(p) + i;
        rotate(low[n][u], high[n][u], cos_low[u], sin_low[u], to);
        rotate(high[n][u], low[n][u], cos_high[u], sin_high[u], to + p.half);
      }
    }
  }
  if constexpr (Turn::kPartial) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (active && first + n < side.heads) rest[n].store(out + n * p.width, Norm::kNorm ? factor[n] : 0.0f, p, lane);
    }
  }
}

// A call's operands on the host: checked, and how they lie in memory.
template <typename In, typename W, typename Table, typename Out, typename Norm, typename Turn = Halves>
struct QkOperands {
  Device device;
  Symbol batch{"B"}, sequence{"S"}, heads{"H"}, kv_heads{"Hkv"}, columns{"D"}, tables{"1 or B"}, numbers{"R or R/2"}, both{"2"};
  int64_t rotary = 0;     // R, once the tables are taken
  bool sixteen = true, eight = true;  // whether vectors of 16 and of 8 bytes, or what E elements are, can be loaded

  static int64_t strided(const TensorView& view, int dim) { return view.shape()[dim] == 1 ? int64_t{0} : view.strides()[dim]; }

  void lies(const void* pointer, int64_t size, std::initializer_list<int64_t> strides) {
    for (const auto& [elements, ok] : {std::pair<int64_t, bool*>{8, &sixteen}, std::pair<int64_t, bool*>{4, &eight}}) {
      const int64_t bytes = elements * size < 16 ? elements * size : 16;
      *ok = *ok && aligned(pointer, bytes);
      for (const int64_t stride : strides) *ok = *ok && stride * size % bytes == 0;
    }
  }

  // `out` may be none where nothing is written back.
  void take(QkSide& side, const TensorView& x, Symbol& count, const char* name, const TensorView* out, const char* out_name,
            const Optional<TensorView>& weight, const char* weight_name) {
    TensorMatcher({batch, sequence, count, columns}).dtype<In>().strides({kAny, kAny, kAny, 1}).device(device).verify(x, name);
    side.x = data(x);
    side.batch = strided(x, 0), side.token = strided(x, 1), side.head = strided(x, 2);
    lies(side.x, sizeof(In), {side.batch, side.token, side.head});
    if (out != nullptr) {
      TensorMatcher({batch, sequence, count, columns}).dtype<Out>().contiguous().device(device).verify(*out, out_name);
      side.out = data(*out);
      lies(side.out, sizeof(Out), {});
    }
    if constexpr (Norm::kNorm) {
      if (!weight.has_value()) TVM_FFI_THROW(ValueError) << weight_name << ": wanted a tensor, found None";
      const TensorView numbers = weight.value();
      TensorMatcher({columns}).dtype<W>().contiguous().device(device).verify(numbers, weight_name);
      side.weight = data(numbers);
      lies(side.weight, sizeof(W), {});
    }
    if (x.shape()[2] > (int64_t{1} << 16)) {
      TVM_FFI_THROW(ValueError) << name << ": wanted at most 65536 heads, found shape " << shape_of(x);
    }
    side.heads = static_cast<uint32_t>(x.shape()[2]);
  }

  // The tables, and what depends on the size of a head; `x` is named where that is wrong. `turned` is R; 0 for D.
  void take_tables(QkNormRopeParams& p, const TensorView& cos, const TensorView& sin, double eps, const TensorView& x,
                   const char* name, int64_t turned = 0) {
    rotary = Turn::kPartial ? turned : columns.value();
    if (Turn::kPartial ? rotary < 2 || rotary >= columns.value() : turned != 0 && turned != rotary) {
      TVM_FFI_THROW(ValueError) << "rotary: wanted columns of " << name << ", found " << turned << " of " << shape_of(x);
    }
    if (rotary % (Turn::kPairs ? 4 : 2) != 0) {
      TVM_FFI_THROW(ValueError) << "rotary: wanted a multiple of " << (Turn::kPairs ? 4 : 2) << ", found " << rotary;
    }
    if constexpr (Turn::kJoined) {
      TensorMatcher({tables, sequence, numbers, both}).dtype<Table>().strides({kAny, kAny, 2, 1}).device(device).verify(cos, "cos");
      if (both.value() != 2) TVM_FFI_THROW(ValueError) << "cos: wanted cos and sin in turn, found shape " << shape_of(cos);
    } else {
      TensorMatcher({tables, sequence, numbers}).dtype<Table>().strides({kAny, kAny, 1}).device(device).verify(cos, "cos");
      TensorMatcher({tables, sequence, numbers}).dtype<Table>().strides({kAny, kAny, 1}).device(device).verify(sin, "sin");
    }
    if (numbers.value() != (Turn::kHalfTables ? rotary / 2 : rotary)) {
      TVM_FFI_THROW(ValueError) << "cos: wanted " << (Turn::kHalfTables ? "half of " : "") << rotary << " columns, found shape "
                                << shape_of(cos);
    }
    if (tables.value() != 1 && tables.value() != batch.value()) {
      TVM_FFI_THROW(ValueError) << "cos: wanted a batch of 1 or of " << name << "'s " << batch.value() << ", found shape "
                                << shape_of(cos);
    }
    const int64_t width = columns.value();
    if (width < 2 || width > 256 || width % 2 != 0) {
      TVM_FFI_THROW(ValueError) << name << ": wanted an even last dimension of 2 to 256, found shape " << shape_of(x);
    }
    p.cos = data(cos), p.cos_batch = strided(cos, 0), p.cos_token = strided(cos, 1);
    lies(p.cos, sizeof(Table), {p.cos_batch, p.cos_token});
    if constexpr (!Turn::kJoined) {
      p.sin = data(sin), p.sin_batch = strided(sin, 0), p.sin_token = strided(sin, 1);
      lies(p.sin, sizeof(Table), {p.sin_batch, p.sin_token});
    }
    p.sequence = static_cast<uint32_t>(sequence.value()), p.half = static_cast<int>(rotary / 2);
    p.width = static_cast<int>(width);
    p.eps = static_cast<float>(eps), p.per_column = 1.0f / static_cast<float>(width);
  }

  int64_t tokens() const { return batch.value() * sequence.value(); }

  // Starts with the lanes L, the elements E and vectors U of a lane, and the heads N in flight that suit the heads; `tokens` and
  // `heads` say whether a lane group for each head fills the GPU.
  //
  // Two heads in flight share what they read of cos, sin and the weights, and hide memory's latency; while a lane group for each
  // head does not fill the GPU, one head is over sooner. fp32 has enough bytes in flight with one.
  template <typename Start>
  void start(const Start& start, int64_t heads) const {
    const int64_t width = columns.value();
    if (sixteen && rotary % 16 == 0 && width % 8 == 0) {
      if (width <= 64) return in_flight<4>(start, heads);
      if (width <= 128) return in_flight<8>(start, heads);
      return in_flight<16>(start, heads);
    }
    if (eight && rotary % 8 == 0 && width % 4 == 0) {
      if (width <= 128) return start.template run<16, 4, 1, 1>();
      return start.template run<32, 4, 1, 1>();
    }
    start.template run<32, 1, 4, 1>();
  }

 private:
  template <int L, typename Start>
  void in_flight(const Start& start, int64_t heads) const {
    if constexpr (sizeof(In) == 2 && sizeof(Table) == 2) {
      if (tokens() * heads * L > int64_t{1024} * sm_count(device.id())) return start.template run<L, 8, 1, 2>();
    }
    start.template run<L, 8, 1, 1>();
  }
};

// Cuts the heads of `p` into parts of N of a token: how many lane groups there are.
inline int64_t cut_into_parts(QkNormRopeParams& p, int64_t tokens, int n) {
  for (QkSide& side : p.side) side.parts = static_cast<uint32_t>(ceil_div(side.heads, n));
  const int64_t groups = tokens * (p.side[0].parts + p.side[1].parts);
  if (groups >= int64_t{1} << 32) {
    TVM_FFI_THROW(ValueError) << "q: wanted fewer than 2^32 heads of all tokens, found about " << groups * n;
  }
  p.groups = static_cast<uint32_t>(groups);
  return groups;
}

template <typename In, typename W, typename Table, typename Out, typename Norm, typename Turn = Halves>
struct QkNormRope {
  static void run(TensorView q, Optional<TensorView> k, Optional<TensorView> q_weight, Optional<TensorView> k_weight, TensorView cos,
                  TensorView sin, double eps, TensorView q_out, TensorView k_out) {
    turn(q, k, q_weight, k_weight, cos, sin, eps, 0, q_out, k_out);
  }
  // `rotary`: R; 0 for D.
  static void turn(TensorView q, Optional<TensorView> k, Optional<TensorView> q_weight, Optional<TensorView> k_weight, TensorView cos,
                   TensorView sin, double eps, int64_t rotary, TensorView q_out, TensorView k_out) {
    QkOperands<In, W, Table, Out, Norm, Turn> operands;
    QkNormRopeParams p{};
    operands.take(p.side[0], q, operands.heads, "q", &q_out, "q_out", q_weight, "q_weight");
    if (k.has_value()) operands.take(p.side[1], k.value(), operands.kv_heads, "k", &k_out, "k_out", k_weight, "k_weight");
    operands.take_tables(p, cos, sin, eps, q, "q", rotary);
    const int64_t tokens = operands.tokens();
    if (tokens == 0 || p.side[0].heads + p.side[1].heads == 0) return;

    DeviceGuard guard(operands.device.id());
    operands.start(Start{p, tokens, operands.device.id()}, p.side[0].heads + p.side[1].heads);
  }

 private:
  struct Start {
    QkNormRopeParams& p;
    int64_t tokens;
    int device;

    template <int L, int E, int U, int N>
    void run() const {
      const int64_t groups = cut_into_parts(p, tokens, N);
      Launch(static_cast<unsigned>(ceil_div(groups, kQkBlock / L)), kQkBlock)
          .stream(env_stream(device))
          .programmatic()
          .run(qk_norm_rope_kernel<In, W, Table, Out, Norm, L, E, U, N, NoStore, Turn>, p);
    }
  };
};

}  // namespace inductor_ext
