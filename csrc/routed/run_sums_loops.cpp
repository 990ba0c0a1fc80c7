// Sums of parts of a gradient, compiled once per CPU level.
#include "common/convert.h"
#include "routed/run_sums.h"

namespace taskloom {
namespace {

template <class Acc>
void add_up_as(Acc* __restrict__ sums, int64_t pieces, int64_t stride, int64_t n, DType dtype, void* out, int64_t offset) {
  for (int64_t piece = 1; piece < pieces; ++piece) {
    const Acc* const added = sums + piece * stride;
    for (int64_t i = 0; i < n; ++i) sums[i] = sums[i] + added[i];
  }
  store_block(dtype, sums, n, out, offset);
}

void add_up(bool wide, void* sums, int64_t pieces, int64_t stride, int64_t n, DType dtype, void* out, int64_t offset) {
  if (wide) {
    add_up_as(static_cast<double*>(sums), pieces, stride, n, dtype, out, offset);
  } else {
    add_up_as(static_cast<float*>(sums), pieces, stride, n, dtype, out, offset);
  }
}

const RunSumsLoops table = {add_up};

}  // namespace

TASKLOOM_EXPORT_LOOPS(RunSumsLoops, run_sums_loops, table)

}  // namespace taskloom
