// MXFP8: the scale of a block of 32 elements, and where scales lie in memory. Everything here runs on the host too.
//
//   scale = 2^(byte - 127), an e8m0 byte, 255 is NaN;   data = saturating cast of x * factor to e4m3
//   Rceil   the least power of two that is not below amax / 448 in fp32, as cuBLAS and cvt.rp.satfinite.ue8m0 have it
//   Floor   2^(floor(log2 amax) - 8), OCP MX 1.0
//
// Bytes and factors are torchao's (moe/mx.py says where they are odd); amax comes as the bits of a non-negative float or NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace inductor_ext::mx {

constexpr int kBlock = 32;                    // elements with one scale
constexpr int kTileRows = 128, kTileCols = 4;  // of swizzled scales
constexpr int kTileBytes = kTileRows * kTileCols;

constexpr uint32_t kInfinity = 0x7f800000u, kNan = 0x7fc00000u;

// ---- scales -----------------------------------------------------------------------------------------------------------------

// 2^(127 - byte) as a float, for bytes up to 253.
constexpr __host__ __device__ __forceinline__ uint32_t inverse_bits(uint32_t byte) { return (254u - byte) << 23; }

struct Rceil {
  constexpr __host__ __device__ __forceinline__ static uint32_t byte(uint32_t amax) {
    if (amax >= kInfinity) return amax == kInfinity ? 254 : 255;
    // 448 is 1.75 * 2^8: a mantissa above 1.75 carries. The quotient's own rounding hides no such mantissa but this one, next
    // above 448 * 2^-127, where it is a subnormal number.
    constexpr uint32_t kHidden = (8u << 23) + 0x600001u;
    const uint32_t exponent = (amax - (amax == kHidden ? 1u : 0u) + 0x1fffffu) >> 23;
    return exponent > 8 ? exponent - 8 : 0;
  }
  constexpr __host__ __device__ __forceinline__ static uint32_t factor(uint32_t byte) {
    if (byte == 0) return 0x3f800000u;  // all such a block has is zero in e4m3, times 1 as well
    if (byte >= 254) return byte == 254 ? 0x00400000u : kNan;
    return inverse_bits(byte);
  }
};

struct Floor {
  constexpr __host__ __device__ __forceinline__ static uint32_t byte(uint32_t amax) {
    if (amax > kInfinity) return 255;
    const uint32_t exponent = amax >> 23;
    return exponent > 8 ? exponent - 8 : 0;
  }
  constexpr __host__ __device__ __forceinline__ static uint32_t factor(uint32_t byte) {
    if (byte == 255) return 0;  // torchao divides by infinity: what is not NaN or infinite becomes zero
    return inverse_bits(byte == 0 ? 1 : byte);
  }
};

// The value of an e8m0 byte.
constexpr __host__ __device__ __forceinline__ uint32_t e8m0_bits(uint32_t byte) {
  return byte == 0 ? 0x00400000u : byte == 255 ? kNan : byte << 23;
}
__host__ __device__ __forceinline__ float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}
__host__ __device__ __forceinline__ float e8m0_to_float(uint32_t byte) { return as_float(e8m0_bits(byte)); }

// ---- swizzled scales --------------------------------------------------------------------------------------------------------
// Tiles of 128 rows by 4 scales, 512 bytes each, along K first; every group of rows begins with a tile.

constexpr __host__ __device__ __forceinline__ int64_t ceil_tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Of a scale in its tile: row < 128, col < 4.
constexpr __host__ __device__ __forceinline__ int tile_offset(int row, int col) { return row % 32 * 16 + row / 32 * 4 + col; }

// Of a scale in its group, which has `cols` scales a row.
constexpr __host__ __device__ __forceinline__ int64_t swizzled_offset(int64_t row, int64_t col, int64_t cols) {
  const int64_t tile = row / kTileRows * ceil_tiles(cols, kTileCols) + col / kTileCols;
  return tile * kTileBytes + tile_offset(static_cast<int>(row % kTileRows), static_cast<int>(col % kTileCols));
}

// ---- a warp's share ---------------------------------------------------------------------------------------------------------
// A warp takes 32 blocks: `Lanes` lanes hold one, E = 32 / Lanes elements each, in one of `Lanes` accesses. So an access of the
// warp reaches E blocks side by side, and of the 32 scales each lane has just one to write, where the whole warp writes one
// sector of 32 bytes.

// The block that a lane holds a part of after access u.
template <int Lanes>
constexpr __host__ __device__ __forceinline__ int block_of(int u, int lane) {
  return u * (32 / Lanes) + lane / Lanes;
}
// The block whose scale a lane writes: of the access number lane % Lanes.
template <int Lanes>
constexpr __host__ __device__ __forceinline__ int written_by(int lane) {
  return block_of<Lanes>(lane % Lanes, lane);
}

}  // namespace inductor_ext::mx
