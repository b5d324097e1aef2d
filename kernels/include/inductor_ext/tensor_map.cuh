// Tensor maps: what tells the copy engine of compute capability 9.0 and later of a tensor in memory and of the boxes it copies.
//
//   encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, base, rows, columns, pitch, box_rows, box_columns);
//   encode(&map, type, size, base, {columns, rows, batch}, {pitch, pitch of the batch}, {box_columns, box_rows, 1});
//
// A box lies in shared memory as rows of its first size, swizzled as widely as these allow: 128, 64 or 32 bytes. What a box has
// outside the tensor is read as zeros. The function that encodes is the driver's, found at run time: nothing links to it.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>

#include "inductor_ext/launch.cuh"

namespace inductor_ext {

inline PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

// A map of elements of `size` bytes: sizes and the box from the innermost dimension on, `pitches` in bytes from the second on.
template <size_t Dims>
void encode(CUtensorMap* map, CUtensorMapDataType type, int size, const void* base, const std::array<int64_t, Dims>& sizes,
            const std::array<int64_t, Dims - 1>& pitches, const std::array<int, Dims>& box) {
  cuuint64_t wanted_sizes[Dims], wanted_pitches[Dims];
  cuuint32_t wanted_box[Dims], ones[Dims];
  for (size_t i = 0; i < Dims; ++i) {
    wanted_sizes[i] = static_cast<cuuint64_t>(sizes[i]), wanted_box[i] = static_cast<cuuint32_t>(box[i]), ones[i] = 1;
    if (i + 1 < Dims) wanted_pitches[i] = static_cast<cuuint64_t>(pitches[i]);
  }
  const int width = box[0] * size;
  const CUtensorMapSwizzle swizzle = width == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : width == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result = encode_tiled()(map, type, Dims, const_cast<void*>(base), wanted_sizes, wanted_pitches, wanted_box, ones,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: error " << int(result) << " for " << sizes[1] << " x " << sizes[0]
                                << ", pitch " << pitches[0] << " bytes, box " << box[1] << " x " << box[0];
  }
}

// A map of [rows][columns] elements, `pitch` bytes from row to row, copied in boxes of [box_rows][box_columns].
inline void encode(CUtensorMap* map, CUtensorMapDataType type, int size, const void* base, int64_t rows, int64_t columns,
                   int64_t pitch, int box_rows, int box_columns) {
  encode<2>(map, type, size, base, {columns, rows}, {pitch}, {box_columns, box_rows});
}

template <typename Out> struct MapType;
template <> struct MapType<float> { static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_FLOAT32; };
template <> struct MapType<__half> { static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_FLOAT16; };
template <> struct MapType<__nv_bfloat16> { static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; };

}  // namespace inductor_ext
