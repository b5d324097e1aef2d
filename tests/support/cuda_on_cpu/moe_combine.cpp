// moe_combine's kernels behind a C function, for tests/kernels/test_moe_combine.py.
#include "moe_combine/moe_combine.cuh"

#include "entry.h"

namespace {

template <typename Y, typename W, typename Product, typename Out, typename Index, typename Id>
int call(const Given* y, const Given* weights, const Given* inverse, const Given* ids, int64_t experts, const Given* out, char* error,
         int length) {
  return attempt(error, length, [&] {
    MoeCombine<Y, W, Product, Out, Index, Id>::run(view(*y), maybe(weights), view(*inverse), maybe(ids), experts, view(*out));
  });
}

}  // namespace

// 0, or 1 with `error` filled.
#define VARIANT(name, ...)                                                                                                    \
  extern "C" int name(const Given* y, const Given* weights, const Given* inverse, const Given* ids, int64_t experts,         \
                      const Given* out, char* error, int length) {                                                           \
    return call<__VA_ARGS__>(y, weights, inverse, ids, experts, out, error, length);                                         \
  }
VARIANT(bf16, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, int64_t, int64_t)
VARIANT(bf16_by_fp32, __nv_bfloat16, float, float, __nv_bfloat16, int64_t, int32_t)
VARIANT(fp16, __half, __half, __half, float, int32_t, int64_t)
VARIANT(fp32, float, float, float, float, int32_t, int32_t)
