// multi_gate_combine and its backward: many gates over one pool of experts. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// Which columns each row of a table holds, row after row: those of row r are columns[begin[r]] .. columns[begin[r + 1]].
struct RowLists {
  const int64_t* begin;
  const int32_t* columns;
};

struct MultiGate {
  Elements logits;       // [batch, gates, experts]
  Elements z;            // [batch, experts, width]
  Elements self_logits;  // as logits, or no data
  int64_t gates, experts, width;
  RowLists read, own, either;  // experts of a gate, of its self gate, and of the two together
  RowLists readers;            // gates of an expert
  bool sigmoid;
  void* out;    // [batch, gates, width] in the dtype of z
  void* probs;  // as logits, in the dtype of the arithmetic
};

struct MultiGateBackward {
  MultiGate forward;                    // its out and probs are not looked at
  RowLists readers;                     // gates of an expert
  Elements gradient;                    // as out
  Elements for_probs;                   // as logits, or no data
  void *for_logits, *for_z, *for_self;  // as logits, z and self_logits, or null
};

// Places of the width that are worked on at once, so that what all gates read stays in the nearest cache.
inline int64_t multi_gate_tile(int64_t experts, int64_t width) {
  constexpr int64_t cached = 4096, least = 128;
  const int64_t tile = cached / experts / least * least;
  return tile < least ? (width < least ? width : least) : (width < tile ? width : tile);
}

// Accumulators of scratch that a call takes: for sixteen samples together, whose weights are computed as lanes.
inline int64_t multi_gate_scratch(int64_t gates, int64_t experts, int64_t width) {
  return 6 * 16 * gates * experts + (experts + gates + 1) * multi_gate_tile(experts, width);
}

struct MultiGateLoops {
  // Samples begin .. begin + n; `scratch` holds what multi_gate_scratch says.
  void (*forward)(bool wide, const MultiGate& view, int64_t begin, int64_t n, void* scratch);
  void (*backward)(bool wide, const MultiGateBackward& view, int64_t begin, int64_t n, void* scratch);
};

TASKLOOM_LOOPS(MultiGateLoops, multi_gate_loops)

}  // namespace taskloom
