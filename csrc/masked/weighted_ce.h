// weighted_ce: what is done to a tile of logits between the matrix products that make it and use it. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// Tiles, and rows that are about to be multiplied, hold float, or double where `wide`. A tile's columns come in whole lanes: up to a
// multiple of `tile_lanes` its rows have room, which is written to.
constexpr int64_t tile_lanes = 16;

struct LogitTile {
  void* logits;
  int64_t rows, columns, stride;
};

struct WeightedCeLoops {
  void (*load)(bool wide, const Elements& from, int64_t offset, int64_t n, void* to);
  void (*store)(bool wide, const void* from, int64_t n, DType dtype, void* to, int64_t offset);
  // Each row's largest logit, and its sum of exp(logit - largest).
  void (*reduce)(bool wide, const LogitTile& tile, void* largest, void* sum);
  // Turns logits into coefficient[r] * (exp(logit - log_sum_exp[r]) - (column == target[r])); a target may lie outside of the tile.
  void (*slope)(bool wide, const LogitTile& tile, const void* log_sum_exp, const void* coefficient, const int64_t* target);
};

TASKLOOM_LOOPS(WeightedCeLoops, weighted_ce_loops)

}  // namespace taskloom
