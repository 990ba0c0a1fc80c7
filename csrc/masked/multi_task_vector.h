// multi_task_vector: the weighted sum of the tasks' deltas. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

struct MultiTaskVector {
  Elements base;
  const Elements* tuned;
  const double* weight;
  int64_t tasks;
};

struct MultiTaskVectorLoops {
  // Entries begin .. begin + n of the sum, each product rounded before its add, into the whole `out`: float, or double where `wide`.
  void (*sum)(bool wide, const MultiTaskVector& view, int64_t begin, int64_t n, void* out);
};

TASKLOOM_LOOPS(MultiTaskVectorLoops, multi_task_vector_loops)

}  // namespace taskloom
