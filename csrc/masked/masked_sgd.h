// masked_sgd_: one SGD step of the active entries of a parameter; momentum is stored for them alone. Torch-free.
#pragma once

#include "common/cpu_level.h"
#include "masked/masked_step.h"

namespace taskloom {

// A loop rounds each number to its own arithmetic once.
struct SgdScalars {
  double step_size;  // -lr
  double momentum, undamped, weight_decay;
  bool first;  // the buffer takes the gradient as it is
  bool nesterov, maximize;
};

struct MaskedSgdLoops {
  // `buffer` is null without momentum.
  void (*step)(const MaskedParameter& of, void* buffer, const SgdScalars& scalars, const MaskedPiece& piece);
};

TASKLOOM_LOOPS(MaskedSgdLoops, masked_sgd_loops)

}  // namespace taskloom
