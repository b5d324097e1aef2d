// Stand-in for tensor maps and the copy engine: boxes come some turns later, zeros where the tensor is not.
#pragma once

#include "hopper_on_cpu.h"

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };

struct CUtensorMap {
  const uint8_t* base;
  int size, dims;
  int64_t sizes[3], pitches[3];
  int box[3];

  void load(std::array<int, 3> at, uint64_t* barrier, uint8_t* to) const {
    if (hopper_on_cpu::in_shared(to) % 1024 != 0) hopper_on_cpu::fail("a box that does not begin at a multiple of 1024 bytes");
    hopper_on_cpu::later([=, map = *this] { map.bring(at, barrier, to); });
  }

 private:
  void bring(std::array<int, 3> at, uint64_t* barrier, uint8_t* to) const {
    const int rows = box[1];
    for (int row = 0; row < rows; ++row) {
      for (int x = 0; x < box[0]; ++x) {
        const bool inside = at[0] + x < sizes[0] && at[1] + row < sizes[1] && (dims < 3 || at[2] < sizes[2]);
        uint8_t* place = to + row * 128 + x * size;
        const uint32_t byte = hopper_on_cpu::in_shared(place);
        place = inductor_ext::shared + (byte ^ ((byte >> 7 & 7) << 4));
        std::memset(place, 0, size);
        if (!inside) continue;
        const uint8_t* from = base + int64_t{at[0] + x} * size + (at[1] + row) * pitches[0] + (dims < 3 ? 0 : at[2] * pitches[1]);
        hopper_on_cpu::check_access(from, size, size);
        std::memcpy(place, from, size);
      }
    }
    auto& told = hopper_on_cpu::barrier_at(barrier);
    told.bytes -= rows * box[0] * size;
    told.settle();
  }
};

namespace inductor_ext {

template <size_t Dims>
void encode(CUtensorMap* map, CUtensorMapDataType, int size, const void* base, const std::array<int64_t, Dims>& sizes,
            const std::array<int64_t, Dims - 1>& pitches, const std::array<int, Dims>& box) {
  *map = {static_cast<const uint8_t*>(base), size, static_cast<int>(Dims), {}, {}, {}};
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) hopper_on_cpu::fail("a tensor map whose base is no multiple of 16");
  for (size_t i = 0; i < Dims; ++i) {
    map->sizes[i] = sizes[i], map->box[i] = box[i];
    if (box[i] < 1 || box[i] > 256 || sizes[i] < 1) hopper_on_cpu::fail("a tensor map with sizes that cannot be");
    if (i + 1 < Dims) map->pitches[i] = pitches[i];
    if (i + 1 < Dims && pitches[i] % 16 != 0) hopper_on_cpu::fail("a tensor map whose pitch is no multiple of 16");
  }
  if (box[0] * size != 128) hopper_on_cpu::fail("a box whose rows are not 128 bytes");
}
inline void encode(CUtensorMap* map, CUtensorMapDataType type, int size, const void* base, int64_t rows, int64_t columns,
                   int64_t pitch, int box_rows, int box_columns) {
  encode<2>(map, type, size, base, {columns, rows}, {pitch}, {box_columns, box_rows});
}

}  // namespace inductor_ext
