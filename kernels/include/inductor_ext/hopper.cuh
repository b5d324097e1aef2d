// Compute capability 9.0 device primitives of the FP8 matrix products, on CUTLASS's CuTe atoms: wgmma on 128-byte-swizzled
// operands in shared memory, the tensor copy engine, and the full/empty barriers of a ring of stages.
//
// Both operands are K-major: a stage holds [rows][128] bytes of each, swizzled in groups of 8 rows (1 024 bytes), as the copy
// engine writes them (CU_TENSOR_MAP_SWIZZLE_128B) and wgmma reads them.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // N in steps of 8, not only powers of two

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>

#include <cstdint>
#include <utility>

#include "inductor_ext/cutlass_types.cuh"

namespace inductor_ext {

constexpr int kBlockK = 128;      // elements, and bytes, of K in a stage
constexpr int kMmaK = 32;         // of one wgmma
constexpr int kWarpgroup = 128;   // threads
constexpr int kSharedLimit = 232448;  // bytes of shared memory that a CTA may have

// ---- wgmma ------------------------------------------------------------------------------------------------------------------

// The descriptor of a K-major operand with 128-byte swizzle: 1 024 bytes from one group of 8 rows to the next.
__device__ __forceinline__ uint64_t operand(const void* shared) {
  const uint64_t address = (cute::cast_smem_ptr_to_uint(shared) & 0x3FFFF) >> 4;
  return address | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// D[64, N] (+)= X[64, 128] · Y[N, 128]ᵀ, fp32 in registers. Thread t of the warpgroup holds, at [4 * j + 2 * i + e], row
// 16 * (t / 32) + (t % 32) / 4 + 8 * i, column 8 * j + 2 * (t % 4) + e.
template <typename X, typename Y, int N>
struct Wgmma {
  using Atom = decltype(cute::SM90::GMMA::ss_op_selector<typename CutlassType<X>::type, typename CutlassType<Y>::type, float,
                                                         cute::Shape<cute::Int<64>, cute::Int<N>, cute::Int<kMmaK>>>());

  // One stage's K; `first` overwrites D.
  static __device__ __forceinline__ void stage(const void* x, const void* y, float (&d)[N / 2], bool first) {
    const uint64_t dx = operand(x), dy = operand(y);
#pragma unroll
    for (int k = 0; k < kBlockK / kMmaK; ++k) {
      const auto scale = first && k == 0 ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One;
      call(dx + k * (kMmaK >> 4), dy + k * (kMmaK >> 4), d, scale, std::make_index_sequence<N / 2>());
    }
  }

  // 32 elements of K, by their descriptors, into D alone: what it had is overwritten.
  static __device__ __forceinline__ void step(uint64_t dx, uint64_t dy, float (&d)[N / 2]) {
    call(dx, dy, d, cute::SM90::GMMA::ScaleOut::Zero, std::make_index_sequence<N / 2>());
  }

 private:
  template <size_t... I>
  static __device__ __forceinline__ void call(uint64_t dx, uint64_t dy, float (&d)[N / 2], cute::SM90::GMMA::ScaleOut scale,
                                              std::index_sequence<I...>) {
    Atom::fma(dx, dy, d[I]..., scale);
  }
};

template <int N>
__device__ __forceinline__ void fence_registers(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(d[i]);
}
template <int N, int M>
__device__ __forceinline__ void fence_registers(uint32_t (&a)[N][M]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < M; ++j) cute::warpgroup_fence_operand(a[i][j]);
  }
}

// ---- the ring of stages -----------------------------------------------------------------------------------------------------

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// Position in the ring; `phase` flips each time round.
struct Slot {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++index == stages) index = 0, phase ^= 1;
  }
  __device__ __forceinline__ void skip(int count, int stages) {
    index += count;
    phase ^= (index / stages) & 1;
    index %= stages;
  }
};

constexpr uint64_t kEvictNormal = 0x1000000000000000;

__device__ __forceinline__ void load_tile(const void* map, uint64_t* full, void* shared, int k, int row) {
  cute::SM90_TMA_LOAD_2D::copy(map, full, kEvictNormal, shared, k, row);
}
__device__ __forceinline__ void load_tile_to(uint16_t ctas, const void* map, uint64_t* full, void* shared, int k, int row) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(map, full, ctas, kEvictNormal, shared, k, row);
}
// A box of a map of three dimensions.
__device__ __forceinline__ void load_tile(const void* map, uint64_t* full, void* shared, int k, int row, int which) {
  cute::SM90_TMA_LOAD_3D::copy(map, full, kEvictNormal, shared, k, row, which);
}
__device__ __forceinline__ void load_tile_to(uint16_t ctas, const void* map, uint64_t* full, void* shared, int k, int row, int which) {
  cute::SM90_TMA_LOAD_MULTICAST_3D::copy(map, full, ctas, kEvictNormal, shared, k, row, which);
}

// … or of four.
__device__ __forceinline__ void load_tile(const void* map, uint64_t* full, void* shared, int x, int y, int z, int w) {
  cute::SM90_TMA_LOAD_4D::copy(map, full, kEvictNormal, shared, x, y, z, w);
}

// A store into the shared memory of another CTA of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t cta, const void* shared) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(cta));
  return remote;
}
__device__ __forceinline__ void store_remote(uint32_t address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
// The copy engine writes `bytes` of this CTA's shared memory into CTA `cta`, at the place that `to` has here, and counts them at
// that CTA's barrier.
__device__ __forceinline__ void copy_to(uint32_t cta, void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address_in(cta, to)),
               "r"(cute::cast_smem_ptr_to_uint(from)), "r"(bytes), "r"(address_in(cta, barrier))
               : "memory");
}

// ---- arithmetic -------------------------------------------------------------------------------------------------------------

// 2^x within 2^-22 of it (PTX's bound); what would be subnormal is zero.
__device__ __forceinline__ float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// ---- dtypes -----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack(__nv_bfloat16*, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack(__half*, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename Out>
__device__ __forceinline__ Out narrow(float x) {
  if constexpr (sizeof(Out) == 4) {
    return x;
  } else if constexpr (std::is_same_v<Out, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

}  // namespace inductor_ext
