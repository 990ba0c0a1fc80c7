// expert_combine and its backward: weighed sums of rows that indices name. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "gating/indices.h"

namespace taskloom {

struct ExpertCombine {
  Elements y, weight;  // [rows, width]; [tokens, slots]
  Indices inverse;     // [tokens, slots]
  int64_t rows, slots, width;
  void* out;  // [tokens, width] as y
};

struct ExpertCombineBackward {
  ExpertCombine forward;
  Elements gradient;  // as out
  void* for_y;        // as y, or null
  void* for_weight;   // as weight, or null
};

// Entries of a row that are worked on at once, and rows that are added up, or multiplied with one, at once.
constexpr int64_t expert_combine_block = 512, expert_combine_rows = 8, expert_dot_rows = 4;

struct ExpertCombineLoops {
  // Tokens begin .. end. `scratch` holds expert_combine_rows + 1 blocks and `slots` accumulators.
  void (*forward)(bool wide, const ExpertCombine& view, int64_t begin, int64_t end, void* scratch);
  // The same; `scratch` holds expert_dot_rows + 2 blocks, `slots` accumulators and `slots` doubles.
  void (*backward)(bool wide, const ExpertCombineBackward& view, int64_t begin, int64_t end, void* scratch);
};

TASKLOOM_LOOPS(ExpertCombineLoops, expert_combine_loops)

}  // namespace taskloom
