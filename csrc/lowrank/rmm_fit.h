// rmm_fit: principal components of the tasks' vectors at each position. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// Positions that are worked on at a time, one in each lane of a register of doubles.
constexpr int64_t fit_lanes = 8;

struct RmmFit {
  Elements vectors;  // [tasks, positions, width]
  int64_t tasks, positions, width, rank;
  bool center;
  // In the dtype of vectors: [positions, width], [positions, rank, width], [tasks, positions, rank].
  void *mean, *basis, *coefficients;
};

struct RmmFitLoops {
  // Bytes that `fit` works in.
  int64_t (*scratch)(const RmmFit& view);
  // Positions first .. first + count, count <= fit_lanes; scratch is aligned to 64 bytes.
  void (*fit)(const RmmFit& view, int64_t first, int64_t count, void* scratch);
};

TASKLOOM_LOOPS(RmmFitLoops, rmm_fit_loops)

}  // namespace taskloom
