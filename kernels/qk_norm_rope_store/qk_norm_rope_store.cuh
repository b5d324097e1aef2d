// qk_norm_rope, with K's heads stored into the KV cache as they are rotated, and V's beside them, in one launch.
//
//   y   = norm(k * rsqrt(mean(k²) + eps), weight), rounded; k itself without a norm            q alike, to q_out
//   out = y * cos + (-y[R/2:R], y[:R/2]) * sin, y[R:]; or by pairs                     as qk_norm_rope.cuh has it
//   k_cache[n, row] = cast(k_program(out[b, s])),  v_cache[n, row] = cast(v_program(v[b, s]))       k_out = out where it is asked for
//
//   k, v [B, S, Hkv, D], q [B, S, H, D] or none, unit last stride; cos, sin [1 or B, S, R or R/2]; weights [D]
//   k_cache, v_cache  [N, slots, Hkv, D], unit last stride. FP8 or its bytes as uint8; or of out's and v's dtype, copied as they are
//   loc               [B * S / N] or none: cache_rows.cuh. N is 1, or B with a row of its own for each sequence's tokens
//   k_scale, v_scale  operand Scalar<0, T> of the programs; c0..c7 are shared by both
//
// The grid's first blocks have whole tokens: a lane group takes heads of K and V in turn, so that the block knows once which row
// the token goes to, and whether a later token takes it (cache_rows.cuh: up to kScanTokens tokens are compared, kTargets of them a
// block where there are many; beyond, a block claims its token's row). The other blocks turn q's heads meanwhile.
#pragma once

#include <algorithm>
#include <utility>

#include "inductor_ext/cache_rows.cuh"
#include "inductor_ext/fp8.cuh"
#include "qk_norm_rope/qk_norm_rope.cuh"

namespace inductor_ext {

struct CacheSide {
  void* cache;
  int64_t sequence, slot, head;  // strides, elements
  const void* scale;
  bool whole;  // vectors of E elements can be stored
};

struct QkNormRopeStoreParams : QkNormRopeParams {  // side[1] is k, whose parts are none
  QkSide v;
  CacheSide k_to, v_to;
  CacheRows rows;          // of one sequence of the cache
  uint32_t store_blocks;   // chunks of all sequences
  uint32_t chunks, chunk;  // of a sequence; tokens of a chunk
  bool v_whole, claims;
  Consts consts;
};

template <typename Cache>
constexpr bool kIsFp8 = false;
template <>
constexpr bool kIsFp8<__nv_fp8_e4m3> = true;
template <>
constexpr bool kIsFp8<__nv_fp8_e5m2> = true;

// One vector through a chain of steps into the cache; without FP8 there are no steps.
template <typename Cache, bool Saturated, typename Chain, typename T, int N>
__device__ __forceinline__ void store_cached(const Raw<T, N>& raw, const typename Chain::Prepared& prepared, Cache* to, bool whole) {
  if constexpr (kIsFp8<Cache>) {
    float v[N];
    raw.unpack(v);
    Chain::apply(prepared, v);
    const Bytes<N> bytes = cast_fp8<Cache, Saturated>(v);
    whole ? bytes.store(to) : store_apart(bytes, to);
  } else {
    static_assert(std::is_same_v<Cache, T>, "what is not cast to FP8 is copied");
    whole ? store_half(raw, to) : store_apart(raw, to);
  }
}

template <typename In, typename Out, typename Cache, bool Saturated, typename KProgram, typename VProgram, typename Loc>
struct KvStore {
  static_assert(!KProgram::kRow && !VProgram::kRow, "a cache has one scale, not one a row");
  static constexpr bool kStores = true;
  using Params = QkNormRopeStoreParams;
  using KChain = ToFp8<KProgram>;
  using VChain = ToFp8<VProgram>;

  template <typename Norm, typename W, typename Table, int L, int E, int U, typename Turn>
  __device__ static __forceinline__ void run(const Params& p) {
    constexpr int kGroups = kQkBlock / L;
    __shared__ unsigned repeated;
    __shared__ unsigned long long seen;
    const int lane = threadIdx.x % L;
    const uint32_t group = threadIdx.x / L;
    const uint32_t tokens = static_cast<uint32_t>(p.rows.tokens);
    const uint32_t from_end = p.store_blocks - 1 - blockIdx.x;  // what the product ahead wrote last is still in L2
    const uint32_t sequence = from_end / p.chunks, first = (from_end - sequence * p.chunks) * p.chunk;
    const uint32_t last = min(first + p.chunk, tokens);
    const QkSide& k = p.side[1];
    const uint32_t items = k.heads + p.v.heads;

    Raw<In, E> low[U], high[U];
    Raw<Table, E> cos_low[U], cos_high[U], sin_low[U], sin_high[U];
    Raw<W, E> weight_low[Norm::kNorm ? U : 1], weight_high[Norm::kNorm ? U : 1];
    Rest<Turn, In, W, Norm, L, E, U> rest;  // of the columns behind those that are turned
    // This lane's part of the heads `base` to `base + kGroups` of K and V, and of what K's need.
    auto load = [&](uint32_t token_of_sequence, uint32_t base) {
      const uint32_t token = sequence * tokens + token_of_sequence, batch = token / p.sequence, at = token - batch * p.sequence;
      const uint32_t item = base + group;
      const bool of_v = item >= k.heads;
      const QkSide& side = of_v ? p.v : k;
      const In* x = static_cast<const In*>(side.x) + batch * side.batch + at * side.token + (of_v ? item - k.heads : item) * side.head;
      const Table* cos = static_cast<const Table*>(p.cos) + batch * p.cos_batch + at * p.cos_token;
      const Table* sin = static_cast<const Table*>(p.sin) + batch * p.sin_batch + at * p.sin_token;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int i = (u * L + lane) * E;
        low[u].zero(), high[u].zero();
        if (item >= items || i >= p.half) continue;
        if (of_v && !p.v_whole) {
          load_apart(low[u], x + i), load_apart(high[u], x + p.half + i);
        } else {
          load_half(low[u], x + i), load_half(high[u], x + p.half + i);
        }
        if (of_v) continue;
        load_tables<Turn>(cos_low[u], cos_high[u], sin_low[u], sin_high[u], cos, sin, i, p.half);
        if constexpr (Norm::kNorm) {
          const W* weight = static_cast<const W*>(k.weight);
          load_half(weight_low[u], weight + i), load_half(weight_high[u], weight + p.half + i);
        }
      }
      if constexpr (Turn::kPartial) {
        rest.load(x, static_cast<const W*>(k.weight), p, lane, item < items, of_v && !p.v_whole);
      }
    };

    wait_for_previous_kernel();
    load(first, 0);
    const auto k_prepared = KChain::prepare(Env{p.consts, &p.k_to.scale});
    typename VChain::Prepared v_prepared;
    if (p.v.heads > 0) v_prepared = VChain::prepare(Env{p.consts, &p.v_to.scale});
    allow_next_kernel();

    // What `load` has read, turned and cast, to row `row` of the cache; a negative one is not there.
    auto store = [&](uint32_t token_of_sequence, int64_t row, uint32_t base) {
      const uint32_t item = base + group;
      const bool of_v = item >= k.heads;
      float factor = 0.0f;
      if constexpr (Norm::kNorm) {  // V's heads too: a warp's lanes sum together
        float sum = 0.0f;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          float a[E], b[E];
          low[u].unpack(a), high[u].unpack(b);
#pragma unroll
          for (int e = 0; e < E; ++e) sum = fmaf(b[e], b[e], fmaf(a[e], a[e], sum));
        }
        sum = rest.squares(sum);
        factor = rsqrtf(group_sum<L>(sum) * p.per_column + p.eps);
      }
      Raw<In, E> low_other[Turn::kPairs ? U : 1], high_other[Turn::kPairs ? U : 1];
      if constexpr (Turn::kPairs) {  // all lanes: a neighbour may be another lane's
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if constexpr (Norm::kNorm) {
            if (!of_v) normalise<Norm>(low[u], factor, weight_low[u]), normalise<Norm>(high[u], factor, weight_high[u]);
          }
          low_other[u] = neighbours(low[u]), high_other[u] = neighbours(high[u]);
        }
      }
      if (item >= items) return;
      const uint32_t head = of_v ? item - k.heads : item;
      const CacheSide& to = of_v ? p.v_to : p.k_to;
      Cache* cached = static_cast<Cache*>(to.cache) + sequence * to.sequence + row * to.slot + head * to.head;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int i = (u * L + lane) * E;
        if (i >= p.half) continue;
        if (of_v) {
          if (row < 0) continue;
          if constexpr (kIsFp8<Cache> || std::is_same_v<In, Cache>) {  // else V is stored by another launch
            store_cached<Cache, Saturated, VChain>(low[u], v_prepared, cached + i, to.whole);
            store_cached<Cache, Saturated, VChain>(high[u], v_prepared, cached + p.half + i, to.whole);
          }
          continue;
        }
        if constexpr (Norm::kNorm && !Turn::kPairs) {
          normalise<Norm>(low[u], factor, weight_low[u]), normalise<Norm>(high[u], factor, weight_high[u]);
        }
        negate_sin<Turn>(sin_low[u], sin_high[u], i);
        const Raw<In, E>& beside_low = Turn::kPairs ? low_other[Turn::kPairs ? u : 0] : high[u];
        const Raw<In, E>& beside_high = Turn::kPairs ? high_other[Turn::kPairs ? u : 0] : low[u];
        const Raw<Out, E> turned_low = rotated<Out>(low[u], beside_low, cos_low[u], sin_low[u]);
        const Raw<Out, E> turned_high = rotated<Out>(high[u], beside_high, cos_high[u], sin_high[u]);
        if (k.out != nullptr) {
          const int64_t token = static_cast<int64_t>(sequence) * tokens + token_of_sequence;
          Out* out = static_cast<Out*>(k.out) + (token * k.heads + head) * head_width<Turn>(p) + i;
          store_half(turned_low, out), store_half(turned_high, out + p.half);
        }
        if (row < 0) continue;
        store_cached<Cache, Saturated, KChain>(turned_low, k_prepared, cached + i, to.whole);
        store_cached<Cache, Saturated, KChain>(turned_high, k_prepared, cached + p.half + i, to.whole);
      }
      if constexpr (Turn::kPartial) {
        if (!of_v) rest.finish(factor);
#pragma unroll
        for (int v = 0; v < rest.kVectors; ++v) {
          const int i = rest.column(p, v, lane);
          if (i >= p.width) continue;
          if (of_v) {
            if constexpr (kIsFp8<Cache> || std::is_same_v<In, Cache>) {
              if (row >= 0) store_cached<Cache, Saturated, VChain>(rest.x[v], v_prepared, cached + i, to.whole);
            }
            continue;
          }
          const Raw<Out, E> behind = rest.template at<Out>(v);
          if (k.out != nullptr) {
            const int64_t token = static_cast<int64_t>(sequence) * tokens + token_of_sequence;
            store_half(behind, static_cast<Out*>(k.out) + (token * k.heads + head) * head_width<Turn>(p) + i);
          }
          if (row >= 0) store_cached<Cache, Saturated, KChain>(behind, k_prepared, cached + i, to.whole);
        }
      }
    };

    unsigned taken = 0;  // bit i: a later token has the row of token first + i
    if (p.rows.may_repeat && !p.claims) {
      if (threadIdx.x == 0) repeated = 0;
      __syncthreads();
      const int from = static_cast<int>(first);
      p.rows.wrap ? find_repeated<Loc, true, kQkBlock>(p.rows, from, &repeated)
                  : find_repeated<Loc, false, kQkBlock>(p.rows, from, &repeated);
      __syncthreads();
      taken = repeated;
    }
    for (uint32_t token = first; token < last; ++token) {
      int64_t row = cache_row<Loc>(p.rows, loc_of<Loc>(p.rows, token));
      if (p.rows.check && row == kOutside && threadIdx.x == 0) note_outside(token);
      if (taken >> (token - first) & 1) row = kSkip;
      unsigned long long* slot = nullptr;
      if (p.claims && row >= 0) {
        const auto address = static_cast<Cache*>(p.k_to.cache) + sequence * p.k_to.sequence + row * p.k_to.slot;
        const unsigned long long key = reinterpret_cast<unsigned long long>(address);
        slot = claim_slot(row + sequence);
        while (true) {  // all threads alike
          if (threadIdx.x == 0) seen = claim(slot, key);
          __syncthreads();
          const unsigned long long found = seen;
          __syncthreads();
          if (found == 0) break;
          if (found == key) {
            slot = nullptr, row = kSkip;
            break;
          }
          __nanosleep(100);
        }
      }
      if (row >= 0 || k.out != nullptr) {
        for (uint32_t base = 0; base < items; base += kGroups) {
          if (base > 0 || token > first) load(token, base);
          store(token, row, base);
        }
      }
      if (slot != nullptr) {
        __syncthreads();
        if (threadIdx.x == 0) give_back(slot);
      }
    }
  }
};

template <typename In, typename W, typename Table, typename Out, typename Norm, typename Cache, bool Saturated, typename KProgram,
          typename VProgram, typename Loc, typename Turn = Halves>
struct QkNormRopeStore {
  using Operands = QkOperands<In, W, Table, Out, Norm, Turn>;
  using Store = KvStore<In, Out, Cache, Saturated, KProgram, VProgram, Loc>;

  static void run(TensorView k, Optional<TensorView> q, Optional<TensorView> v, Optional<TensorView> k_weight,
                  Optional<TensorView> q_weight, TensorView cos, TensorView sin, TensorView k_cache, Optional<TensorView> v_cache,
                  Optional<TensorView> k_scale, Optional<TensorView> v_scale, Optional<TensorView> loc, double eps, int64_t mult,
                  int64_t offset, bool wrap, bool keep_k, bool check, double c0, double c1, double c2, double c3, double c4,
                  double c5, double c6, double c7, TensorView q_out, TensorView k_out) {
    turn(k, q, v, k_weight, q_weight, cos, sin, k_cache, v_cache, k_scale, v_scale, loc, eps, 0, mult, offset, wrap, keep_k, check, c0,
         c1, c2, c3, c4, c5, c6, c7, q_out, k_out);
  }
  // `rotary`: R; 0 for D.
  static void turn(TensorView k, Optional<TensorView> q, Optional<TensorView> v, Optional<TensorView> k_weight,
                   Optional<TensorView> q_weight, TensorView cos, TensorView sin, TensorView k_cache, Optional<TensorView> v_cache,
                   Optional<TensorView> k_scale, Optional<TensorView> v_scale, Optional<TensorView> loc, double eps, int64_t rotary,
                   int64_t mult, int64_t offset, bool wrap, bool keep_k, bool check, double c0, double c1, double c2, double c3,
                   double c4, double c5, double c6, double c7, TensorView q_out, TensorView k_out) {
    Operands operands;
    QkNormRopeStoreParams p{};
    operands.take(p.side[1], k, operands.kv_heads, "k", keep_k ? &k_out : nullptr, "k_out", k_weight, "k_weight");
    if (q.has_value()) operands.take(p.side[0], q.value(), operands.heads, "q", &q_out, "q_out", q_weight, "q_weight");
    operands.take_tables(p, cos, sin, eps, k, "k", rotary);
    Symbol sequences("N"), slots("slots");
    take_cache<KProgram>(p.k_to, k_cache, "k_cache", k_scale, "k_scale", operands, sequences, slots);
    if (v.has_value()) {
      if constexpr (!kIsFp8<Cache> && !std::is_same_v<In, Cache>) {
        TVM_FFI_THROW(TypeError) << "v: wanted None where K is not stored in the dtype that it is read in";
      }
      if (!v_cache.has_value()) TVM_FFI_THROW(ValueError) << "v_cache: wanted a tensor, as v is one, found None";
      take_v(p, v.value(), operands);
      take_cache<VProgram>(p.v_to, v_cache.value(), "v_cache", v_scale, "v_scale", operands, sequences, slots);
    }
    const int64_t tokens = operands.tokens(), batch = operands.batch.value();
    if (sequences.value() != 1 && sequences.value() != batch) {
      TVM_FFI_THROW(ValueError) << "k_cache: wanted 1 sequence or k's " << batch << ", found shape " << shape_of(k_cache);
    }
    p.rows.tokens = sequences.value() == 1 ? tokens : operands.sequence.value(), p.rows.slots = slots.value();
    if (loc.has_value()) {
      TensorMatcher({p.rows.tokens}).dtype<Loc>().contiguous().device(operands.device).verify(loc.value(), "loc");
      p.rows.loc = data(loc.value());
    }
    p.rows.mult = mult, p.rows.offset = offset, p.rows.wrap = wrap, p.rows.check = check;
    if (p.rows.tokens >= int64_t{1} << 31) {
      TVM_FFI_THROW(ValueError) << "k: wanted fewer than 2^31 tokens, found " << p.rows.tokens;
    }
    if (tokens == 0 || p.side[0].heads + p.side[1].heads == 0) return;
    p.consts = Consts::of({c0, c1, c2, c3, c4, c5, c6, c7});

    const int device = operands.device.id();
    DeviceGuard guard(device);
    cut_into_chunks(p, sequences.value(), sm_count(device));
    launch_checked<Loc>(p.rows, env_stream(device), [&] { operands.start(Start{p, tokens, device}, p.side[0].heads); });
  }

 private:
  static void take_v(QkNormRopeStoreParams& p, const TensorView& v, Operands& operands) {
    TensorMatcher({operands.batch, operands.sequence, operands.kv_heads, operands.columns})
        .template dtype<In>().strides({kAny, kAny, kAny, 1}).device(operands.device).verify(v, "v");
    p.v.x = data(v), p.v.heads = static_cast<uint32_t>(v.shape()[2]);
    p.v.batch = Operands::strided(v, 0), p.v.token = Operands::strided(v, 1), p.v.head = Operands::strided(v, 2);
  }

  template <typename Program>
  static void take_cache(CacheSide& to, const TensorView& cache, const char* name, const Optional<TensorView>& scale,
                         const char* scale_name, Operands& operands, Symbol& sequences, Symbol& slots) {
    TensorMatcher matcher({sequences, slots, operands.kv_heads, operands.columns});
    if constexpr (kIsFp8<Cache>) {
      matcher.template dtype<Cache, uint8_t>();
    } else {
      matcher.template dtype<Cache>();
    }
    matcher.strides({kAny, kAny, kAny, 1}).device(operands.device).verify(cache, name);
    to.cache = data(cache);
    to.sequence = Operands::strided(cache, 0), to.slot = Operands::strided(cache, 1), to.head = Operands::strided(cache, 2);
    VisitOperands<Program>::with([&](int index, bool, auto type) {
      if (index != 0) TVM_FFI_THROW(ValueError) << scale_name << ": wanted a program with operand 0 only, found " << index;
      if (!scale.has_value()) TVM_FFI_THROW(ValueError) << scale_name << ": wanted a tensor, found None";
      TensorMatcher().template dtype<decltype(type)>().device(operands.device).verify(scale.value(), scale_name);
      if (scale.value().numel() != 1) {
        TVM_FFI_THROW(ValueError) << scale_name << ": wanted one element, found shape " << shape_of(scale.value());
      }
      to.scale = data(scale.value());
    });
  }

  // How repeated rows are found, and how many tokens a block has: kTargets where that leaves every multiprocessor some blocks.
  static void cut_into_chunks(QkNormRopeStoreParams& p, int64_t sequences, int sms) {
    const bool distinct = p.rows.tokens == 1 || (p.rows.loc == nullptr && p.rows.mult > 0 && p.rows.offset >= 0);
    const bool scan = p.rows.loc != nullptr && p.rows.mult != 0 && p.rows.tokens <= kScanTokens;
    p.rows.may_repeat = !distinct, p.claims = !distinct && !scan;
    const bool many = !distinct && scan && p.rows.tokens * sequences >= int64_t{2} * kTargets * sms;
    p.chunk = many ? kTargets : 1;
    p.chunks = static_cast<uint32_t>(ceil_div(p.rows.tokens, p.chunk));
    p.store_blocks = static_cast<uint32_t>(sequences * p.chunks);
  }

  // Whether vectors of E elements of `size` bytes can be read or written there.
  static bool whole(const void* pointer, int64_t size, std::initializer_list<int64_t> strides, int elements) {
    const int64_t bytes = std::min<int64_t>(elements * size, 16);
    bool ok = aligned(pointer, bytes);
    for (const int64_t stride : strides) ok = ok && stride * size % bytes == 0;
    return ok;
  }

  struct Start {
    QkNormRopeStoreParams& p;
    int64_t tokens;
    int device;

    template <int L, int E, int U, int N>
    void run() const {
      const uint32_t kv_heads = std::exchange(p.side[1].heads, 0);  // they are not in the parts
      const int64_t groups = cut_into_parts(p, tokens, N);
      p.side[1].heads = kv_heads;
      p.v_whole = whole(p.v.x, sizeof(In), {p.v.batch, p.v.token, p.v.head}, E);
      for (CacheSide* to : {&p.k_to, &p.v_to}) to->whole = whole(to->cache, sizeof(Cache), {to->sequence, to->slot, to->head}, E);
      const int64_t blocks = p.store_blocks + ceil_div(groups, kQkBlock / L);
      if (blocks >= int64_t{1} << 31) TVM_FFI_THROW(ValueError) << "q: wanted fewer heads of all tokens, found " << groups * N;
      Launch(static_cast<unsigned>(blocks), kQkBlock)
          .stream(env_stream(device))
          .programmatic()
          .run(qk_norm_rope_kernel<In, W, Table, Out, Norm, L, E, U, N, Store, Turn>, p);
    }
  };
};

}  // namespace inductor_ext
