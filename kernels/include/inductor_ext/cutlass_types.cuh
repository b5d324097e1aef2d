// CUTLASS's names of the dtypes that a scaled_mm reads and writes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cutlass/numeric_types.h>

namespace inductor_ext {

template <typename T>
struct CutlassType;
template <> struct CutlassType<__nv_fp8_e4m3> { using type = cutlass::float_e4m3_t; };
template <> struct CutlassType<__nv_fp8_e5m2> { using type = cutlass::float_e5m2_t; };
template <> struct CutlassType<__nv_bfloat16> { using type = cutlass::bfloat16_t; };
template <> struct CutlassType<__half> { using type = cutlass::half_t; };
template <> struct CutlassType<float> { using type = float; };

}  // namespace inductor_ext
