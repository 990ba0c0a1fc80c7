// manifold_loss and its backward: weighed squared distances of rows to rows of a table. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "gating/indices.h"

namespace taskloom {

struct ManifoldLoss {
  Elements r, reference;  // [rows, width]; [known, width]
  Indices ids;            // [rows, neighbours], -1 for none
  Elements weight;        // as ids; 0 for none
  int64_t known, neighbours, width;
};

// Entries of a row that are worked on at once.
constexpr int64_t manifold_block = 512;

struct ManifoldLossLoops {
  // Rows begin .. end; `loss` is in the dtype of the arithmetic. `scratch` holds 2 blocks, `neighbours` accumulators and as many doubles.
  void (*forward)(bool wide, const ManifoldLoss& view, int64_t begin, int64_t end, void* loss, void* scratch);
  // The same; `for_r` is as r. `scratch` holds 3 blocks and `neighbours` accumulators.
  void (*backward)(bool wide, const ManifoldLoss& view, const Elements& gradient, int64_t begin, int64_t end, void* for_r, void* scratch);
};

TASKLOOM_LOOPS(ManifoldLossLoops, manifold_loss_loops)

}  // namespace taskloom
