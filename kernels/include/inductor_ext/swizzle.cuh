// Where the copy engine has the 16 bytes of a row of a box: exchanged as widely as the row is long (CU_TENSOR_MAP_SWIZZLE_…B).
#pragma once

#include <cstdint>

namespace inductor_ext {

// Byte `byte` of row `row` of a chunk, swizzled as the copy engine reads it.
template <int Box>
__device__ __forceinline__ uint8_t* in_chunk(uint8_t* chunk, int row, int byte) {
  return chunk + ((row * Box + byte) ^ (((row * Box) >> 7 & (Box / 16 - 1)) << 4));
}

}  // namespace inductor_ext
