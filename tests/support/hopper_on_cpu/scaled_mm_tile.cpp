// A class of scaled_mm's tile family behind a C function for each of its entries: tests/kernels/test_scaled_mm_tile_cpu.py.
#include "scaled_mm/tile.cuh"

#include "../programs.h"
#include "entry.h"

namespace {

Array<Tensor> array(const Given* const* given, int count) {
  Array<Tensor> made;
  for (int i = 0; i < count; ++i) made.push_back(view(*given[i]));
  return made;
}

template <typename Tile>
void run_one(const Given* a, const Given* b, const Given* scale_a, const Given* scale_b, const Given* bias, const Given* residual,
             const Given* out, bool static_b) {
  const TensorView a_view = view(*a), b_view = view(*b), scales[2] = {view(*scale_a), view(*scale_b)}, out_view = view(*out);
  if constexpr (Tile::End::kAdds) {
    Tile::run_add(a_view, b_view, scales[0], scales[1], optional(bias), view(*residual), out_view, static_b, 1, 1);
  } else if constexpr (Tile::kStores) {
    Tile::run(a_view, b_view, scales[0], scales[1], optional(bias), out_view, static_b, 1, 1);
  } else {
    hopper_on_cpu::fail("a class that does more than to store");
  }
}

template <typename Tile>
void run_several(const Given* const* a, int a_count, const Given* const* b, int count, const Given* const* scale_a,
                 const Given* const* scale_b, const Given* const* bias, const Given* out, bool static_b) {
  if constexpr (Tile::kStores) {
    Array<Optional<Tensor>> added;
    for (int i = 0; i < count; ++i) added.push_back(optional(bias[i]));
    Tile::run_group(array(a, a_count), array(b, count), array(scale_a, a_count), array(scale_b, count), added, view(*out), static_b, 1, 1);
  } else {
    hopper_on_cpu::fail("a class that does more than to store");
  }
}

template <typename Tile>
void run_gated(const Given* a, const Given* const* b, const Given* scale_a, const Given* const* scale_b, const Given* const* bias,
               const Given* out, bool static_b, int cluster_m, int cluster_n) {
  if constexpr (Tile::End::kGates) {
    Tile::run_act_mul(view(*a), view(*b[0]), view(*b[1]), view(*scale_a), view(*scale_b[0]), view(*scale_b[1]), optional(bias[0]),
                      optional(bias[1]), view(*out), static_b, cluster_m, cluster_n);
  } else {
    hopper_on_cpu::fail("a class that gates nothing");
  }
}

template <typename Tile>
void run_heads(const Given* a, const Given* const* b, int count, const Given* scale_a, const Given* const* scale_b,
               const Given* q_weight, const Given* k_weight, const Given* cos, const Given* sin, int rotated, double eps,
               const Given* out, bool static_b) {
  if constexpr (Tile::End::kRotates) {
    Tile::run_rope(view(*a), array(b, count), view(*scale_a), array(scale_b, count), optional(q_weight), optional(k_weight), view(*cos),
                   view(*sin), rotated, eps, view(*out), static_b, 1, 1);
  } else {
    hopper_on_cpu::fail("a class that rotates nothing");
  }
}

}  // namespace

extern "C" int run(const Given* a, const Given* b, const Given* scale_a, const Given* scale_b, const Given* bias, const Given* residual,
                   const Given* out, bool static_b, int sms, unsigned seed, char* error, int length) {
  return attempt(sms, seed, error, length, [&] { run_one<TILE>(a, b, scale_a, scale_b, bias, residual, out, static_b); });
}

extern "C" int run_group(const Given* const* a, int a_count, const Given* const* b, int count, const Given* const* scale_a,
                         const Given* const* scale_b, const Given* const* bias, const Given* out, bool static_b, int sms, unsigned seed,
                         char* error, int length) {
  return attempt(sms, seed, error, length, [&] { run_several<TILE>(a, a_count, b, count, scale_a, scale_b, bias, out, static_b); });
}

extern "C" int run_act_mul(const Given* a, const Given* const* b, const Given* scale_a, const Given* const* scale_b,
                           const Given* const* bias, int cluster_m, int cluster_n, const Given* out, bool static_b, int sms,
                           unsigned seed, char* error, int length) {
  return attempt(sms, seed, error, length, [&] { run_gated<TILE>(a, b, scale_a, scale_b, bias, out, static_b, cluster_m, cluster_n); });
}

extern "C" int run_rope(const Given* a, const Given* const* b, int count, const Given* scale_a, const Given* const* scale_b,
                        const Given* q_weight, const Given* k_weight, const Given* cos, const Given* sin, int rotated, double eps,
                        const Given* out, bool static_b, int sms, unsigned seed, char* error, int length) {
  return attempt(sms, seed, error, length, [&] {
    run_heads<TILE>(a, b, count, scale_a, scale_b, q_weight, k_weight, cos, sin, rotated, eps, out, static_b);
  });
}
