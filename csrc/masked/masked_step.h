// What the fused optimiser steps share: a parameter, its gradient, and which entries are active. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace taskloom {

// How active entries are named: all of them, one bit an entry, or ascending flat indices.
enum class ActiveKind : int32_t { all, packed, index32, index64 };

// State of active entries lies next to each other, in order of their flat indices: float32, or float64 where the parameter is.
struct MaskedParameter {
  void* parameter;
  const void* gradient;  // of the parameter's dtype
  DType dtype;
  ActiveKind kind;
  const void* active;
};

// What one call of a loop does: entries begin .. begin + n (begin a multiple of 8), or indices begin .. begin + n of a list of indices;
// the state of the first of them is element `place`, and `active` of them have some.
struct MaskedPiece {
  int64_t begin, n, place, active;
};

}  // namespace taskloom
