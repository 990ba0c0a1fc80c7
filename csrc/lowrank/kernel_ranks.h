// Order statistics of the magnitudes of a matrix that kernel_merge makes of two factors, exact, without the matrix. Torch-free.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "lowrank/kernel_merge.h"

namespace taskloom {

struct Ordered {
  uint64_t at, next;
};

// Bits of the magnitude of a rank, 0-based from the smallest, and of the rank after it; above those of infinity where any entry is NaN.
// What `factors.keep` has room for is kept then, and `factors` reads it from there on.
Ordered ordered_magnitudes(KernelFactors& factors, int64_t rank, const ParallelFor& parallel, int64_t threads);

}  // namespace taskloom
