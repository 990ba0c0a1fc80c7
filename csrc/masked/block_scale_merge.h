// block_scale_merge: base + sum of coefficient * delta, one coefficient per task and block or group of a block; and the coefficients'
// gradients. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// One block of a merge. Task t's delta is deltas[t * delta_stride], its coefficients start at coef[t * coef_stride].
struct ScaleBlock {
  Elements base;  // backward: the gradient of the output
  const Elements* deltas;
  int64_t delta_stride, tasks;
  const void* coef;  // float, or double where `wide`; forward only
  int64_t coef_stride, groups;
  const uint8_t* partition;  // the group of each entry; null: all are in group 0
  void* out;                 // of base's dtype; forward only
};

// Tensors that are read side by side. A core follows about a dozen streams through memory; of many more it loses most.
constexpr int64_t scale_streams = 12;
// Sums that more tasks than that are added to in turn stay in the second-level cache.
constexpr int64_t scale_piece_bytes = 1 << 17;
// Bytes of scratch that `merge` uses for so many tasks.
inline int64_t scale_merge_scratch(int64_t tasks) { return tasks > 1 ? scale_piece_bytes : 0; }

// Running sums of one task over a block without groups.
constexpr int64_t dot_lanes = 16;
// Doubles of scratch that `dots` uses.
inline int64_t scale_dots_scratch(int64_t tasks) { return tasks * dot_lanes; }

// Both return the largest group number among entries begin .. begin + n; from `groups` on they count as the last group.
struct BlockScaleMergeLoops {
  int32_t (*merge)(bool wide, const ScaleBlock& block, int64_t begin, int64_t n, void* scratch);
  // sums[t * groups + k] = the inner product of gradient and delta t over group k, in double.
  int32_t (*dots)(const ScaleBlock& block, int64_t begin, int64_t n, double* sums, double* scratch);
};

TASKLOOM_LOOPS(BlockScaleMergeLoops, block_scale_merge_loops)

}  // namespace taskloom
