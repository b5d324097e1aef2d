// mxfp8_grouped_mm's set-up kernel behind a C function, and the same one group after the other:
// for tests/kernels/test_mxfp8_blackwell.py.
#include "mxfp8_grouped_mm/groups.cuh"

using namespace inductor_ext;

extern "C" void group_table(const int* offs, int64_t tokens, int64_t experts, int64_t n, int64_t k, int64_t out_size, int64_t scale_rows,
                            bool in_order, int64_t* table) {
  const GroupedSizes sizes = dense_sizes(tokens, experts, n, k, out_size, scale_rows);
  if (in_order) return set_up_groups_on_host(sizes, offs, WritePlace{table});
  launch_set_up(sizes, offs, WritePlace{table}, 0);
}
