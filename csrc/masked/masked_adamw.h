// masked_adamw_: one AdamW step of the active entries of a parameter; their moments are stored for them alone. Torch-free.
#pragma once

#include "common/cpu_level.h"
#include "masked/masked_step.h"

namespace taskloom {

// Computed in double on the host; a loop rounds each to its own arithmetic once.
struct AdamwScalars {
  double kept;              // 1 - lr * weight_decay
  double rate1;             // 1 - beta1
  double beta2, rate2;      // and 1 - beta2
  double root_correction2;  // sqrt(1 - beta2 ** step)
  double eps;
  double step_size;  // -lr / (1 - beta1 ** step)
  bool maximize;
};

struct MaskedAdamwLoops {
  void (*step)(const MaskedParameter& of, void* exp_avg, void* exp_avg_sq, const AdamwScalars& scalars, const MaskedPiece& piece);
};

TASKLOOM_LOOPS(MaskedAdamwLoops, masked_adamw_loops)

}  // namespace taskloom
