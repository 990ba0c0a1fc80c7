// Parts of a gradient added up in a fixed order. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

struct RunSumsLoops {
  // Entries offset .. offset + n of `out` from the sum of `pieces` runs of n accumulators (double where `wide`, else float), `stride`
  // apart; the first run is changed.
  void (*add_up)(bool wide, void* sums, int64_t pieces, int64_t stride, int64_t n, DType dtype, void* out, int64_t offset);
};

TASKLOOM_LOOPS(RunSumsLoops, run_sums_loops)

}  // namespace taskloom
