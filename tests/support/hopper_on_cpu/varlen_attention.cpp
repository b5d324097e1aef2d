// varlen_attention's kernel behind a C function: tests/kernels/test_varlen_attention_hopper_cpu.py.
#include "varlen_attention/hopper.cuh"

#include "../programs.h"
#include "entry.h"

extern "C" int run(const Given* q, const Given* k, const Given* v, const Given* ends, double scale, int64_t left, int64_t right,
                   bool padded, const Given* out, int sms, unsigned seed, char* error, int length) {
  return attempt(sms, seed, error, length, [&] {
    const bool ran = VarlenAttention<ATTENTION>::run(view(*q), view(*k), view(*v), optional(ends), scale, left, right, padded, view(*out));
    if (!ran) hopper_on_cpu::fail("refused");
  });
}
