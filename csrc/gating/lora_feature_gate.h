// lora_feature_gate and its backward: what is done to tiles of rows between the matrix products. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// One row of a tile; all in the dtype of the arithmetic.
struct GateRow {
  int64_t features, maps, map_stride;
  void* logits;        // [maps, features], the maps `map_stride` apart; backward puts their gradients in their place
  const void* weight;  // [maps]
  const void* x;       // [features]
  void* out;           // [features]: the result, or the part of x's gradient that does not go through the maps
};

struct LoraFeatureGateLoops {
  // rows x columns of any dtype, the rows next to each other, in the dtype of the arithmetic; and back.
  void (*load)(bool wide, const Elements& from, int64_t offset, int64_t n, void* to);
  void (*store)(bool wide, const void* from, int64_t n, DType dtype, void* to, int64_t offset);
  void (*forward)(bool wide, const GateRow& row);
  void (*backward)(bool wide, const GateRow& row, const void* gradient, void* for_weight);
};

TASKLOOM_LOOPS(LoraFeatureGateLoops, lora_feature_gate_loops)

}  // namespace taskloom
