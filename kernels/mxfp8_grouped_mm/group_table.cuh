// The places of groups (groups.cuh) as a table of numbers, for tests: no operator uses it.
#pragma once

#include "mxfp8_grouped_mm/groups.cuh"

#include <inductor_ext/tensor.h>

namespace inductor_ext {

struct GroupTable {
  static void run(TensorView offs, int64_t tokens, int64_t n, int64_t k, int64_t out_size, int64_t scale_rows, TensorView table) {
    Symbol E("E");
    Device device;
    TensorMatcher({E}).dtype<int32_t>().contiguous().device(device).verify(offs, "offs");
    TensorMatcher({E, 6}).dtype<int64_t>().contiguous().device(device).verify(table, "table");
    DeviceGuard guard(device.id());
    const GroupedSizes sizes = dense_sizes(tokens, E.value(), n, k, out_size, scale_rows);
    launch_set_up(sizes, data<int>(offs), WritePlace{data<int64_t>(table)}, device.id());
  }
};

}  // namespace inductor_ext
