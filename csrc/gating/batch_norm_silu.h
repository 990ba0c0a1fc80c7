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
  void *for_weight, *for_bias;        // [experts, features] in the dtype of the arithmetic
};

// Rows whose sums are one part, whatever the threads; and the most columns of a piece of work.
constexpr int64_t batch_norm_rows = 256, batch_norm_columns = 512;
// Rows and columns of blocks that are worked on at once: in long runs where each entry is read on its own, in more rows for sums.
constexpr int64_t batch_norm_run_rows = 8, batch_norm_run_columns = 512, batch_norm_sum_rows = 32, batch_norm_sum_columns = 128;
constexpr int64_t batch_norm_block = batch_norm_run_rows * batch_norm_run_columns;
static_assert(batch_norm_columns == batch_norm_run_columns);
static_assert(batch_norm_block == batch_norm_sum_rows * batch_norm_sum_columns);

// Some rows of some columns of an expert.
struct BatchNormPiece {
  int64_t expert, first_row, rows, first, n;
};

struct BatchNormSiluLoops {
  // n values of any dtype, or of one value where there are none, in the dtype of the arithmetic.
  void (*load)(bool wide, const Elements& from, double missing, int64_t n, void* to);
  // 1 / sqrt(var + eps).
  void (*invert)(bool wide, const void* var, double eps, int64_t n, void* rstd);
  // Means and sums of squares about them. `scratch` holds a block.
  void (*moments)(bool wide, const BatchNormSilu& view, const BatchNormPiece& piece, double* mean, double* squares, void* scratch);
  // mean, var and rstd of columns from the moments of all parts, which are `stride` apart.
  void (*join_moments)(bool wide, const BatchNormSilu& view, int64_t column, int64_t n, const double* mean, const double* squares,
                       int64_t stride);
  // Results by the statistics that are there. `scratch` holds two blocks.
  void (*apply)(bool wide, const BatchNormSilu& view, const BatchNormPiece& piece, void* scratch);
  // The sums over rows of the gradient of the activation's argument, and of this times the normalised values. Into y go the gradients of
  // z where the statistics are constants, else, if its dtype is that of the arithmetic, the summands. `scratch` holds three blocks.
  void (*sums)(bool wide, const BatchNormSiluBackward& view, const BatchNormPiece& piece, double* plain, double* product, void* scratch);
  // The gradients of weight and bias from the sums of all parts.
  void (*join_sums)(bool wide, const BatchNormSiluBackward& view, int64_t column, int64_t n, const double* plain, const double* product,
                    int64_t stride);
  // The gradient of z after these. `scratch` holds three blocks.
  void (*finish)(bool wide, const BatchNormSiluBackward& view, const BatchNormPiece& piece, void* scratch);
};

TASKLOOM_LOOPS(BatchNormSiluLoops, batch_norm_silu_loops)

}  // namespace taskloom
