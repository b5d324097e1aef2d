// Stand-in for the rounding of the step language.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

template <typename T, int N>
void round_to(float (&v)[N]) {
  for (int i = 0; i < N; ++i) v[i] = to_float(from_float<T>(v[i]));
}

}  // namespace inductor_ext
