// window_group_norm_silu and its backward: channels outside of a window count as zeros in the statistics of their group. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "routed/windows.h"

namespace taskloom {

struct WindowGroupNorm {
  Elements x;  // [samples, channels, places]
  Windows windows;
  int64_t channels, places, groups;
  Elements weight, bias;  // [channels], or no data
  double eps;
  bool outside;       // whether the channels outside of the window are results too, or zeros
  void* y;            // as x
  void *mean, *rstd;  // [samples, groups] in the dtype of the arithmetic
};

struct WindowGroupNormBackward {
  WindowGroupNorm forward;          // its y is the gradient of x, or null
  Elements gradient;                // as x
  const void *for_mean, *for_rstd;  // the gradients of these two results, in the dtype of the arithmetic, or null
  void* sums;  // [samples, 2, channels] in the dtype of the arithmetic: each sample's part of the gradients of weight and bias
};

// Entries that are worked on at once.
constexpr int64_t group_norm_block = 1024;

struct WindowGroupNormLoops {
  // One group of one sample. `scratch` holds 3 blocks and 2 accumulators for each of the group's channels.
  void (*forward)(bool wide, const WindowGroupNorm& view, int64_t sample, int64_t group, void* scratch);
  void (*backward)(bool wide, const WindowGroupNormBackward& view, int64_t sample, int64_t group, void* scratch);
};

TASKLOOM_LOOPS(WindowGroupNormLoops, window_group_norm_loops)

}  // namespace taskloom
