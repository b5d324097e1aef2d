// Stand-in for the rounding of the step language.
#pragma once

#include "vec.cuh"

namespace inductor_ext {

template <typename T>
float round_to(float v) { return widen(narrow<T>(v)); }
template <typename T, int N>
void round_to(float (&v)[N]) {
  for (float& each : v) each = widen(narrow<T>(each));
}
inline float estimate_of_inverse(float v) { return 1.0f / v; }

}  // namespace inductor_ext
