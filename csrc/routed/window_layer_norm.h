// window_layer_norm and its backward: rows whose channels outside of a window count as zeros. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "routed/windows.h"

namespace taskloom {

struct WindowLayerNorm {
  Elements x;  // [samples, rows, channels]
  Windows windows;
  int64_t rows, channels;
  Elements shift, scale;  // [samples, channels], or no data
  double eps;
  bool outside;       // whether the channels outside of the window are results too, or zeros
  void* y;            // as x
  void *mean, *rstd;  // [samples, rows] in the dtype of the arithmetic
};

struct WindowLayerNormBackward {
  Elements gradient, x;  // [samples, rows, channels]
  Windows windows;
  int64_t rows, channels;
  Elements scale;
  const void *mean, *rstd;
  const void *for_mean, *for_rstd;  // the gradients of these two results, in the dtype of the arithmetic, or null
  bool outside;
  void* dx;  // as x, or null
};

struct WindowLayerNormLoops {
  // Rows begin .. begin + n of a sample; `scratch` holds 4 channels accumulators.
  void (*forward)(bool wide, const WindowLayerNorm& view, int64_t sample, int64_t begin, int64_t n, void* scratch);
  // The same, and the rows' part of the gradients of shift and scale, [2, channels] accumulators, unless `sums` is null. `scratch` holds 4
  // channels.
  void (*backward)(bool wide, const WindowLayerNormBackward& view, int64_t sample, int64_t begin, int64_t n, void* sums, void* scratch);
};

TASKLOOM_LOOPS(WindowLayerNormLoops, window_layer_norm_loops)

}  // namespace taskloom
