// batch_norm_silu and its backward: columns of a batch normalised by their own statistics, with an activation. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "routed/activation.h"

namespace taskloom {

struct BatchNormSilu {
  Elements z;  // [rows, experts, features], the features of an expert next to each other
  int64_t row_stride, expert_stride;
  int64_t rows, experts, features;
  const void *weight, *bias;  // these and the next three are [experts, features] in the dtype of the arithmetic
  void *mean, *var, *rstd;
  double eps;
  Activation activation;
  void* y;  // [rows, experts, features] without gaps
};

struct BatchNormSiluBackward {
  BatchNormSilu forward;              // its y is the gradient of z, or null
  Elements gradient;                  // [rows, experts, features] as z
  int64_t row_stride, expert_stride;  // of the gradient
  bool running;                       // whether the statistics are constants
  void *for_weight, *for_bias;        // in the dtype of the arithmetic
};

// Rows that are worked on at once, and the most columns.
constexpr int64_t batch_norm_rows = 32, batch_norm_columns = 64;

struct BatchNormSiluLoops {
  // n values of any dtype, or of one value where there are none, in the dtype of the arithmetic.
  void (*load)(bool wide, const Elements& from, double missing, int64_t n, void* to);
  // 1 / sqrt(var + eps).
  void (*invert)(bool wide, const void* var, double eps, int64_t n, void* rstd);
  // Statistics and results of n columns of an expert, from column `first`. `scratch` holds a block of rows, or all rows where `keep`, of
  // the columns rounded up to lanes; and a block more.
  void (*train)(bool wide, const BatchNormSilu& view, int64_t expert, int64_t first, int64_t n, bool keep, void* scratch);
  // Results of some rows by given statistics. `scratch` holds two blocks.
  void (*apply)(bool wide, const BatchNormSilu& view, int64_t first_row, int64_t rows, void* scratch);
  // Gradients of n columns. `scratch` holds twice a block of rows, or all rows where `keep`; and a block more.
  void (*backward)(bool wide, const BatchNormSiluBackward& view, int64_t expert, int64_t first, int64_t n, bool keep, void* scratch);
};

TASKLOOM_LOOPS(BatchNormSiluLoops, batch_norm_silu_loops)

}  // namespace taskloom
