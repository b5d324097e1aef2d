// A word of global memory that one block or warp has at a time: zero is nobody's.
#pragma once

namespace inductor_ext {

// Zero if the slot was nobody's, and is now `key`'s: what its last owner stored is seen (acquire). Else whose it is.
__device__ __forceinline__ unsigned long long claim(unsigned long long* slot, unsigned long long key) {
  unsigned long long seen;
  asm volatile("atom.acquire.gpu.global.cas.b64 %0, [%1], 0, %2;" : "=l"(seen) : "l"(slot), "l"(key) : "memory");
  return seen;
}
// After everything that the owner stored (release).
__device__ __forceinline__ void give_back(unsigned long long* slot) {
  asm volatile("st.release.gpu.global.b64 [%0], 0;" ::"l"(slot) : "memory");
}

}  // namespace inductor_ext
