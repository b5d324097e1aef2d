// Stand-in for the primitives of compute capability 9.0: what the kernels use of them, and of CuTe and CUTLASS.
#pragma once

#include "hopper_on_cpu.h"
#include "tensor_map.cuh"

namespace cutlass {
struct bfloat16_t {};
namespace arch {
struct NamedBarrier {
  static void sync(unsigned threads, unsigned id) { hopper_on_cpu::meet(hopper_on_cpu::kNamed + static_cast<int>(id), threads); }
  static void arrive(unsigned threads, unsigned id) {
    hopper_on_cpu::come(hopper_on_cpu::kNamed + static_cast<int>(id), threads, [] {});
  }
};
inline void fence_barrier_init() {}
inline void fence_view_async_shared() {}
template <int> void warpgroup_reg_alloc() {}
template <int> void warpgroup_reg_dealloc() {}
inline void cpasync_barrier_arrive_noinc(const void* barrier) {
  const unsigned thread = threadIdx.x;
  struct Arrive {
    const void* barrier;
    unsigned thread;
    void operator()() const {
      if (hopper_on_cpu::cta->unfinished[thread] > 0) return hopper_on_cpu::later(*this);
      hopper_on_cpu::barrier_at(barrier).arrive();
    }
  };
  hopper_on_cpu::later(Arrive{barrier, thread});
}
}  // namespace arch
}  // namespace cutlass

namespace cute {

using uint128_t = uint4;
using TmaDescriptor = CUtensorMap;
template <int I> struct Int { static constexpr int value = I; };
template <typename...> struct Shape {};

inline uint32_t cast_smem_ptr_to_uint(const void* p) { return hopper_on_cpu::in_shared(p); }
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}
inline void warpgroup_fence_operand(float&) {}
inline void warpgroup_fence_operand(uint32_t&) {}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { hopper_on_cpu::cta->issued[threadIdx.x].push_back({}); }
template <int Left>
void warpgroup_wait() {
  const unsigned first = threadIdx.x / 128 * 128;
  hopper_on_cpu::meet(hopper_on_cpu::kWarpgroup + static_cast<int>(first), 128, [&] {
    while (hopper_on_cpu::cta->issued[first].size() > Left + 1) hopper_on_cpu::run_group(first);
  });
}

inline void cluster_arrive_relaxed() { hopper_on_cpu::cluster_arrive(); }
inline void cluster_arrive() { hopper_on_cpu::cluster_arrive(); }
inline void cluster_wait() { hopper_on_cpu::cluster_wait(); }

struct SM90_TMA_STORE_2D {
  static void copy(const CUtensorMap* map, const void* from, int x, int y) { map->store({x, y, 0}, static_cast<const uint8_t*>(from)); }
};
inline void tma_store_fence() { hopper_on_cpu::fence_stores(); }
inline void tma_store_arrive() { hopper_on_cpu::cta->stores[threadIdx.x].push_back({}); }
template <int Left>
void tma_store_wait() { hopper_on_cpu::finish_stores(Left); }

struct SM90_U32x4_STSM_N {
  static void copy(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint128_t& to) { hopper_on_cpu::store_matrices(&to, {a, b, c, d}); }
};
struct SM75_U32x4_LDSM_N {
  static void copy(const uint128_t& from, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    const auto values = hopper_on_cpu::load_matrices(&from);
    a = values[0], b = values[1], c = values[2], d = values[3];
  }
};
struct SM90_TMA_LOAD_3D {
  static void copy(const CUtensorMap* map, uint64_t* barrier, uint64_t, void* to, int x, int y, int z) {
    map->load({x, y, z}, barrier, static_cast<uint8_t*>(to));
  }
};
struct SM90_TMA_LOAD_MULTICAST_3D {
  static void copy(const CUtensorMap* map, uint64_t* barrier, uint16_t ctas, uint64_t, void* to, int x, int y, int z) {
    map->load_to(ctas, {x, y, z}, barrier, static_cast<uint8_t*>(to));
  }
};
// Fragments of two 8 x 8 matrices, transposed; lane 8 * m + r gives the address of row r of matrix m.
struct SM90_U16x4_STSM_T {
  static void copy(uint32_t one, uint32_t two, uint128_t& to) {
    const auto addresses = hopper_on_cpu::exchange(hopper_on_cpu::in_shared(&to));
    const auto values = std::array{hopper_on_cpu::exchange(one), hopper_on_cpu::exchange(two)};
    if (threadIdx.x % 32 == 0) {
      for (int m = 0; m < 2; ++m) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int e = 0; e < 2; ++e) {
            const uint16_t half = static_cast<uint16_t>(values[m][lane] >> 16 * e);
            if (addresses[8 * m + lane % 4 * 2 + e] % 16 != 0) hopper_on_cpu::fail("stmatrix: misaligned");
            std::memcpy(inductor_ext::shared + addresses[8 * m + lane % 4 * 2 + e] + lane / 4 * 2, &half, 2);
          }
        }
      }
    }
    __syncwarp();
  }
};

namespace SM90::GMMA {
inline void issue(hopper_on_cpu::Step step) {
  step.operands = hopper_on_cpu::operands_of(step, threadIdx.x % 128 == 0);
  hopper_on_cpu::cta->issued[threadIdx.x].back().push_back(std::move(step));
}
enum class ScaleOut { Zero, One };
enum class Major { K, MN };
// 16-bit operands, A from registers or from shared memory; `across`: B's rows are K.
template <typename T, bool across>
struct Fma {
  template <typename... D>
  static void fma(const uint32_t& a0, const uint32_t& a1, const uint32_t& a2, const uint32_t& a3, uint64_t b, D&&... d_and_scale) {
    record({{&a0, &a1, &a2, &a3}, b, {}, {}, 0, true, true, across, hopper_on_cpu::of_word<T>}, d_and_scale...);
  }
  template <typename... D>
  static void fma(uint64_t a, uint64_t b, D&&... d_and_scale) {
    record({{}, b, {}, {}, a, true, true, across, hopper_on_cpu::of_word<T>}, d_and_scale...);
  }

 private:
  static void record(hopper_on_cpu::Step step, const ScaleOut& scale) {
    step.adds = scale == ScaleOut::One;
    issue(std::move(step));
  }
  template <typename... D>
  static void record(hopper_on_cpu::Step step, float& d, D&... more) {
    step.d.push_back(&d);
    record(std::move(step), more...);
  }
};
struct FmaOfBytes {
  template <size_t N>
  static void of_shared(uint64_t a, uint64_t b, float (&d)[N], bool adds = false, float (*of_a)(uint8_t) = hopper_on_cpu::of_e4m3,
                        float (*of_b)(uint8_t) = hopper_on_cpu::of_e4m3) {
    hopper_on_cpu::Step step{{}, b, {}, {}, a, adds, false, false, nullptr, of_a, of_b};
    for (float& each : d) step.d.push_back(&each);
    issue(std::move(step));
  }
};
template <typename A, typename B, typename C, typename TileShape, Major OfA = Major::K, Major OfB = Major::K>
Fma<B, OfB == Major::MN> rs_op_selector() { return {}; }
template <typename A, typename B, typename C, typename TileShape>
Fma<B, false> ss_op_selector() { return {}; }
}  // namespace SM90::GMMA
}  // namespace cute

namespace inductor_ext {

constexpr int kSharedLimit = kSharedBytes;
constexpr int kBlockK = 128;
constexpr int kMmaK = 32;
constexpr int kWarpgroup = 128;
constexpr uint64_t kEvictNormal = 0;

inline uint64_t operand(const void* p) {
  return hopper_on_cpu::in_shared(p) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
template <int N>
void fence_registers(float (&)[N]) {}
template <int N, int M>
void fence_registers(uint32_t (&)[N][M]) {}

template <typename A, typename B, int N>
struct Wgmma {
  static void stage(const void* x, const void* y, float (&d)[N / 2], bool first) {
    for (int k = 0; k < kBlockK / kMmaK; ++k) {
      const uint64_t step = k * (kMmaK >> 4);
      cute::SM90::GMMA::FmaOfBytes::of_shared(operand(x) + step, operand(y) + step, d, !first || k > 0, value_of<A>, value_of<B>);
    }
  }
  static void step(uint64_t a, uint64_t b, float (&d)[N / 2]) { cute::SM90::GMMA::FmaOfBytes::of_shared(a, b, d); }

 private:
  template <typename T>
  static float value_of(uint8_t byte) {
    return std::is_same_v<T, __nv_fp8_e5m2> ? hopper_on_cpu::of_e5m2(byte) : hopper_on_cpu::of_e4m3(byte);
  }
};

struct Slot {
  int index = 0;
  uint32_t phase = 0;
  void advance(int stages) {
    if (++index == stages) index = 0, phase ^= 1;
  }
  void skip(int count, int stages) {
    for (int i = 0; i < count; ++i) advance(stages);
  }
};

struct FullBarrier {
  static void init(uint64_t* p, unsigned count) { hopper_on_cpu::barrier_at(p).init(count); }
  static void wait(uint64_t* p, uint32_t phase) {
    hopper_on_cpu::wait_until([&] { return hopper_on_cpu::barrier_at(p).phase != phase; });
  }
  static void arrive(uint64_t* p) { hopper_on_cpu::barrier_at(p).arrive(); }
  static void arrive(uint64_t* p, int cta, bool reaches) {
    if (reaches) hopper_on_cpu::arrive_in(cta, p);
  }
  static void arrive_and_expect_tx(uint64_t* p, uint32_t bytes) {
    hopper_on_cpu::barrier_at(p).bytes += static_cast<int>(bytes);
    arrive(p);
  }
};
using EmptyBarrier = FullBarrier;

inline void load_tile(const CUtensorMap* map, uint64_t* barrier, void* to, int k, int row) {
  map->load({k, row}, barrier, static_cast<uint8_t*>(to));
}

inline void load_tile_to(uint16_t ctas, const CUtensorMap* map, uint64_t* barrier, void* to, int k, int row) {
  map->load_to(ctas, {k, row}, barrier, static_cast<uint8_t*>(to));
}

inline void load_tile(const CUtensorMap* map, uint64_t* barrier, void* to, int k, int row, int which) {
  map->load({k, row, which}, barrier, static_cast<uint8_t*>(to));
}

inline void load_tile_to(uint16_t ctas, const CUtensorMap* map, uint64_t* barrier, void* to, int k, int row, int which) {
  map->load_to(ctas, {k, row, which}, barrier, static_cast<uint8_t*>(to));
}

inline void load_tile(const CUtensorMap* map, uint64_t* barrier, void* to, int x, int y, int z, int w) {
  map->load({x, y, z, w}, barrier, static_cast<uint8_t*>(to));
}

template <typename T> struct CutlassType { using type = T; };
inline float exp2_approximate(float x) { return std::exp2(x); }

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline uint32_t rounded(__nv_bfloat16*, float v) {
  return std::isnan(v) ? 0x7fff : (bits_of(v) + 0x7fff + (bits_of(v) >> 16 & 1)) >> 16;
}
inline uint32_t rounded(__half*, float v) {
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <typename Out>
uint32_t pack(Out* tag, float low, float high) { return rounded(tag, low) | rounded(tag, high) << 16; }

inline float widen(float v) { return v; }
inline float widen(__nv_bfloat16 v) { return hopper_on_cpu::of_bf16(v.bits); }
inline float widen(__half v) { return hopper_on_cpu::of_half(v.bits); }
template <typename Out>
Out narrow(float v) {
  if constexpr (sizeof(Out) == 4) {
    return v;
  } else {
    return {static_cast<uint16_t>(rounded(static_cast<Out*>(nullptr), v))};
  }
}

}  // namespace inductor_ext
