// task_mask: which entries a task needs, one bit each. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

struct TaskMask {
  Elements base, tuned, multi_task_vector;
  double lambda;
};

struct TaskMaskLoops {
  // Entries begin .. begin + n (begin a multiple of 8) into the whole mask `packed`; `wide` computes in double.
  void (*mask)(bool wide, const TaskMask& task, int64_t begin, int64_t n, uint8_t* packed);
};

TASKLOOM_LOOPS(TaskMaskLoops, task_mask_loops)

}  // namespace taskloom
