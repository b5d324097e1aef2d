// Stand-in for tensor maps and the copy engine: boxes come some turns later, zeros where the tensor is not; they go when whoever
// sent them waits for it, but for what lies outside of the tensor.
#pragma once

#include "hopper_on_cpu.h"

enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32
};

struct CUtensorMap {
  uint8_t* base;
  int size, dims;
  int64_t sizes[4], pitches[4];
  int box[4];

  using At = std::array<int, 4>;

  // To CTA `where`; `barrier` and `to` are places in its shared memory.
  void load(At at, uint64_t* barrier, uint8_t* to, hopper_on_cpu::Cta& where = *hopper_on_cpu::cta) const {
    if (hopper_on_cpu::in_shared(to) % 1024 != 0) hopper_on_cpu::fail("a box that does not begin at a multiple of 1024 bytes");
    hopper_on_cpu::later_in(where, [=, map = *this] { map.bring(at, barrier, to); });
  }
  void load_to(unsigned ctas, At at, uint64_t* barrier, uint8_t* to) const {
    for (unsigned rank = 0; ctas >> rank != 0; ++rank) {
      if (ctas >> rank & 1) load(at, barrier, to, hopper_on_cpu::cta_of(rank));
    }
  }
  void store(At at, const uint8_t* from) const {
    if (hopper_on_cpu::in_shared(from) % 1024 != 0) hopper_on_cpu::fail("a box that does not begin at a multiple of 1024 bytes");
    hopper_on_cpu::store_later(from, rows() * width(), [=, map = *this] {
      map.by_pieces(at, from, [](uint8_t* in_shared, uint8_t* in_tensor, int inside) { std::memcpy(in_tensor, in_shared, inside); });
    });
  }

 private:
  int width() const { return box[0] * size; }
  int rows() const { return box[1] * (dims < 3 ? 1 : box[2]); }  // of a fourth dimension a box has one
  // act(place in shared memory, place in the tensor, how many bytes lie in the tensor) for each 16 bytes of a box. The exchange of
  // these goes by the address, and spans as many as a row of the box has.
  template <typename Act>
  void by_pieces(At at, const uint8_t* box_begin, Act act) const {
    for (int row = 0; row < rows(); ++row) {
      const int y = at[1] + row % box[1], z = at[2] + row / box[1];
      for (int x = 0; x < width(); x += 16) {
        const uint32_t byte = hopper_on_cpu::in_shared(box_begin + row * width() + x);
        const bool in_rows = at[0] >= 0 && at[1] >= 0 && y < sizes[1];
        const bool in_row = in_rows && (dims < 3 || (at[2] >= 0 && z < sizes[2])) && (dims < 4 || (at[3] >= 0 && at[3] < sizes[3]));
        const int64_t first = int64_t{at[0]} * size + x;
        const int inside = in_row ? static_cast<int>(std::clamp<int64_t>(sizes[0] * size - first, 0, 16)) : 0;
        uint8_t* in_tensor = base + first + y * pitches[0] + (dims < 3 ? 0 : z * pitches[1]) + (dims < 4 ? 0 : at[3] * pitches[2]);
        if (inside > 0) hopper_on_cpu::check_access(in_tensor, inside, size);
        act(inductor_ext::shared + (byte ^ ((byte >> 7 & (width() / 16 - 1)) << 4)), in_tensor, inside);
      }
    }
  }
  void bring(At at, uint64_t* barrier, uint8_t* to) const {
    by_pieces(at, to, [](uint8_t* in_shared, const uint8_t* in_tensor, int inside) {
      std::memset(in_shared, 0, 16);
      std::memcpy(in_shared, in_tensor, inside);
    });
    auto& told = hopper_on_cpu::barrier_at(barrier);
    told.bytes -= rows() * width();
    told.settle();
  }
};

namespace inductor_ext {

template <size_t Dims>
void encode(CUtensorMap* map, CUtensorMapDataType, int size, const void* base, const std::array<int64_t, Dims>& sizes,
            const std::array<int64_t, Dims - 1>& pitches, const std::array<int, Dims>& box) {
  *map = {const_cast<uint8_t*>(static_cast<const uint8_t*>(base)), size, static_cast<int>(Dims), {}, {}, {}};
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) hopper_on_cpu::fail("a tensor map whose base is no multiple of 16");
  for (size_t i = 0; i < Dims; ++i) {
    map->sizes[i] = sizes[i], map->box[i] = box[i];
    if (box[i] < 1 || box[i] > 256 || sizes[i] < 1) hopper_on_cpu::fail("a tensor map with sizes that cannot be");
    if (i + 1 < Dims) map->pitches[i] = pitches[i];
    if (i + 1 < Dims && pitches[i] % 16 != 0) hopper_on_cpu::fail("a tensor map whose pitch is no multiple of 16");
  }
  if (Dims == 4 && box[3] != 1) hopper_on_cpu::fail("a box of more than one of a fourth dimension, which the stand-in has not");
  const int width = box[0] * size;
  if (width != 32 && width != 64 && width != 128) hopper_on_cpu::fail("a box whose rows are not 32, 64 or 128 bytes");
}
inline void encode(CUtensorMap* map, CUtensorMapDataType type, int size, const void* base, int64_t rows, int64_t columns,
                   int64_t pitch, int box_rows, int box_columns) {
  encode<2>(map, type, size, base, {columns, rows}, {pitch}, {box_columns, box_rows});
}

template <typename Out> struct MapType;
template <> struct MapType<float> { static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_FLOAT32; };
template <> struct MapType<__half> { static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_FLOAT16; };
template <> struct MapType<__nv_bfloat16> { static constexpr auto value = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; };

}  // namespace inductor_ext
