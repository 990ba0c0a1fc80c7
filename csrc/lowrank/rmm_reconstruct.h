// rmm_reconstruct: one task's vectors from the shared bases of their positions. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

struct RmmReconstruct {
  Elements mean, basis, coefficients;  // [positions, width], [positions, rank, width], [positions, rank]
  int64_t width, rank;
  void* out;  // [positions, width], in the dtype of mean
};

struct RmmReconstructLoops {
  // Positions begin .. begin + n; the arithmetic is double where `wide`, else float. `scratch` holds (2 width + rank) accumulators.
  void (*reconstruct)(bool wide, const RmmReconstruct& view, int64_t begin, int64_t n, void* scratch);
};

TASKLOOM_LOOPS(RmmReconstructLoops, rmm_reconstruct_loops)

}  // namespace taskloom
