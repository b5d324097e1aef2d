// downcast_fp8 behind C functions, for tests/kernels/test_downcast_fp8.py.
#include "downcast_fp8/downcast_fp8.cuh"

#include "by_scale.h"
#include "entry.h"

namespace {

struct Call {  // without v one tensor is stored
  const Given *k, *v, *k_cache, *v_cache, *k_scale, *v_scale, *loc, *at;
  int64_t mult, offset, wrap, check;
};

template <typename T, typename Loc, typename Layout>
int store(const Call& c, char* error, int length) {
  using Kernel = DowncastFp8<T, __nv_fp8_e4m3, true, ByScale, ByScale, Loc, Layout>;
  return attempt(error, length, [&] {
    if (c.v == nullptr) {
      Kernel::run_one_at(view(*c.k), view(*c.k_cache), maybe(c.k_scale), maybe(c.loc), maybe(c.at), c.mult, c.offset, c.wrap != 0,
                         c.check != 0, 0, 0, 0, 0, 0, 0, 0, 0);
    } else {
      Kernel::run_at(view(*c.k), view(*c.v), view(*c.k_cache), view(*c.v_cache), maybe(c.k_scale), maybe(c.v_scale), maybe(c.loc),
                     maybe(c.at), c.mult, c.offset, c.wrap != 0, c.check != 0, 0, 0, 0, 0, 0, 0, 0, 0);
    }
  });
}

}  // namespace

// 0, or 1 with `error` filled. The names: blocks, k's scale a head, v's scale a head.
#define VARIANT(name, ...)                                                                                                      \
  extern "C" int bf16_##name(const Call* c, char* error, int length) {                                                         \
    return store<__nv_bfloat16, int64_t, CacheLayout<__VA_ARGS__>>(*c, error, length);                                         \
  }                                                                                                                             \
  extern "C" int fp32_##name(const Call* c, char* error, int length) {                                                         \
    return store<float, int32_t, CacheLayout<__VA_ARGS__>>(*c, error, length);                                                 \
  }
VARIANT(000, false, false, false)
VARIANT(100, true, false, false)
VARIANT(011, false, true, true)
VARIANT(110, true, true, false)
VARIANT(111, true, true, true)
