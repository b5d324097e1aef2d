// Vectors of N elements in registers, loaded and stored in the widest accesses their alignment allows.
//
// `Raw<T, N>` holds N elements of float, __half or __nv_bfloat16 as they are in memory; `unpack` gives their exact fp32 values.
// `load` reads through the read-only path. Not with L1::no_allocate: that cost 10 % of the bandwidth of an element-wise kernel
// on H200 (405 against 368 us for 65536 x 8192 bf16 to FP8; streaming stores did not matter once it was gone).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace inductor_ext {

__device__ __forceinline__ void load_16(uint32_t* r, const void* p) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(p));
}

// 32 bytes, 32-byte aligned: one access where the hardware has it (compute capability 10.0).
__device__ __forceinline__ void load_32(uint32_t* r, const void* p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  asm volatile("ld.global.nc.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "l"(p));
#else
  load_16(r, p);
  load_16(r + 4, static_cast<const char*>(p) + 16);
#endif
}

// 16 bytes from global to shared memory without a register in between; the thread that asked may read them after wait_staged().
__device__ __forceinline__ void stage_16(uint4* shared, const void* p) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(p)
               : "memory");
}
__device__ __forceinline__ void wait_staged() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <typename T, int N>
struct Raw {
  static constexpr int kBytes = sizeof(T) * N;
  static constexpr int kWords = (kBytes + 3) / 4;
  static constexpr int kAlign = kBytes < 16 ? kBytes : 16;  // what `load` asks of the address
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const T* p) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) load_16(words + 4 * i, reinterpret_cast<const char*>(p) + 16 * i);
    } else if constexpr (kBytes == 2) {
      words[0] = __ldg(reinterpret_cast<const unsigned short*>(p));
    } else {
      static_assert(kBytes == 4, "vectors are one element or whole 16-byte accesses");
      words[0] = __ldg(reinterpret_cast<const unsigned*>(p));
    }
  }
  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        reinterpret_cast<uint4*>(p)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
      }
    } else if constexpr (kBytes == 2) {
      *reinterpret_cast<unsigned short*>(p) = static_cast<unsigned short>(words[0]);
    } else {
      *reinterpret_cast<uint32_t*>(p) = words[0];
    }
  }
  // fp32 values rounded to T.
  __device__ __forceinline__ void pack(const float (&v)[N]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) words[i] = __float_as_uint(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = pair(v[2 * i], 2 * i + 1 < N ? v[2 * i + 1 < N ? 2 * i + 1 : 0] : 0.0f);
    }
  }
  // The element-wise product, rounded to T once: as fp32 multiplication and a cast give, whose product of two 16-bit floats is
  // exact. A quarter of the instructions.
  __device__ __forceinline__ void multiply(const Raw& other) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        words[i] = __float_as_uint(__fmul_rn(__uint_as_float(words[i]), __uint_as_float(other.words[i])));
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(words[i]) : "r"(other.words[i]));
#else  // plus -0.0, which changes nothing
        asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(words[i]) : "r"(other.words[i]), "r"(0x80008000u));
#endif
      } else {
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(words[i]) : "r"(other.words[i]));
      }
    }
  }
  // The element-wise sum, rounded to T once: as fp32 addition and a cast give, since fp32 holds the sum of two numbers of 16 bits
  // or is off by less than would round it otherwise.
  __device__ __forceinline__ void add(const Raw& other) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        words[i] = __float_as_uint(__fadd_rn(__uint_as_float(words[i]), __uint_as_float(other.words[i])));
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm("add.rn.bf16x2 %0, %0, %1;" : "+r"(words[i]) : "r"(other.words[i]));
#else  // times one, which changes nothing
        asm("fma.rn.bf16x2 %0, %0, %2, %1;" : "+r"(words[i]) : "r"(other.words[i]), "r"(0x3f803f80u));
#endif
      } else {
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(words[i]) : "r"(other.words[i]));
      }
    }
  }
  __device__ __forceinline__ void unpack(float (&v)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = get(i);
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(low, high);
      return reinterpret_cast<const uint32_t&>(rounded);
    } else {
      const __half2 rounded = __floats2half2_rn(low, high);
      return reinterpret_cast<const uint32_t&>(rounded);
    }
  }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      uint32_t word = words[i / 2];
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
      } else {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word)));
      }
    }
  }
};

// N bytes to global memory; the address is N-byte aligned.
template <int N>
struct Bytes {
  static_assert(N % 4 == 0, "whole words");
  uint32_t words[N / 4];
  __device__ __forceinline__ void store(void* p) const {
    if constexpr (N == 4) {
      *static_cast<uint32_t*>(p) = words[0];
    } else if constexpr (N == 8) {
      *static_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    } else {
      static_assert(N == 16, "4, 8 or 16 bytes");
      *static_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};
template <>
struct Bytes<1> {
  uint8_t byte;
  __device__ __forceinline__ void store(void* p) const { *static_cast<uint8_t*>(p) = byte; }
};

// Vectors of 8 bytes too: `Raw` loads one element or whole 16-byte accesses.
template <typename T, int N>
__device__ __forceinline__ void load_half(Raw<T, N>& raw, const T* p) {
  if constexpr (Raw<T, N>::kBytes == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(p));
    raw.words[0] = words.x, raw.words[1] = words.y;
  } else {
    raw.load(p);
  }
}
template <typename T, int N>
__device__ __forceinline__ void store_half(const Raw<T, N>& raw, T* p) {
  if constexpr (Raw<T, N>::kBytes == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(raw.words[0], raw.words[1]);
  } else {
    raw.store(p);
  }
}

// Element by element, where a tensor does not lie as whole vectors of it would.
template <typename T, int N>
__device__ __forceinline__ void load_apart(Raw<T, N>& raw, const T* p) {
  constexpr int kEach = sizeof(T) == 2 ? 2 : 1;  // elements a word
  raw.zero();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    Raw<T, 1> one;
    one.load(p + i);
    raw.words[i / kEach] |= one.words[0] << (16 * (i % kEach));
  }
}
template <typename T, int N>
__device__ __forceinline__ void store_apart(const Raw<T, N>& raw, T* p) {
  constexpr int kEach = sizeof(T) == 2 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    Raw<T, 1> one;
    one.words[0] = raw.words[i / kEach] >> (16 * (i % kEach));
    one.store(p + i);
  }
}
template <int N>
__device__ __forceinline__ void store_apart(const Bytes<N>& bytes, void* p) {
  if constexpr (N == 1) {
    bytes.store(p);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(bytes.words[i / 4] >> (8 * (i % 4)));
  }
}

}  // namespace inductor_ext
