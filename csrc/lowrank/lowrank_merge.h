// lowrank_merge and its kin: base + (sum of weight * B A), a tile at a time; and the norms of its rows. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// Columns of a panel of the right factors.
constexpr int64_t lowrank_panel = 64;

// The factors of one product, in the dtype of the arithmetic (float, or double where `wide`), which the caller has packed: every adapter's
// rank after the other's.
struct LowrankFactors {
  void* left;   // [rows, rank], weights multiplied in
  void* right;  // [panels, rank, lowrank_panel], 0 after the last column
  int64_t rank;
};

// Rows of storage elements, neighbours in a row next to each other.
struct LowrankRows {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from row to row
};

struct LowrankMerge {
  LowrankRows base;
  int64_t rows, columns;
  const LowrankFactors* factors;  // one for each of `tasks`
  int64_t tasks;
  const void* row_scale;  // [rows] in the dtype of the arithmetic, or null
  void* out;              // a matrix for each task; may be base where there is one task
  DType out_dtype;
  int64_t out_stride, out_task_stride;
};

struct LowrankMergeLoops {
  // left[row, at + k] = weight * from[row, k] for rows begin .. begin + n; `from` is [rows, rank] of its dtype, `at` the adapter's place.
  void (*pack_left)(bool wide, const Elements& from, int64_t rank, double weight, int64_t at, const LowrankFactors& to, int64_t begin,
                    int64_t n);
  // right[panel, at + k] = from[k, columns of the panel] for rows k of `from`, which is [rank, columns].
  void (*pack_right)(bool wide, const Elements& from, int64_t rank, int64_t columns, int64_t at, const LowrankFactors& to);
  // Both for rows begin .. begin + n.
  void (*merge)(bool wide, const LowrankMerge& merge, int64_t begin, int64_t n);
  // norms[row] of base + product, of the first task; squares are summed in double.
  void (*norms)(bool wide, const LowrankMerge& merge, int64_t begin, int64_t n, void* norms);
};

TASKLOOM_LOOPS(LowrankMergeLoops, lowrank_merge_loops)

}  // namespace taskloom
