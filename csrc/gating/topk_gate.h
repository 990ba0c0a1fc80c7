// topk_gate and its backward: rows of router logits to chosen experts and their weights. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

// Experts that a row can choose at most.
constexpr int64_t most_chosen = 32;

// Where the sum of a row's sigmoids is below it, some are too small to be told from 0. Their shares are then the softmax of the row, which
// they are but for rounding.
template <class Acc>
constexpr Acc least_sigmoid_sum = static_cast<Acc>(sizeof(Acc) == 8 ? 0x1p-960 : 0x1p-100);

struct TopKGate {
  Elements logits;  // rows of `experts` neighbours, `row_stride` apart
  int64_t row_stride, experts;
  Elements bias;  // [experts], or no data
  int64_t k;
  bool sigmoid;
  int64_t groups, kept_groups;  // alike where no group is left out
  bool by_two_best;             // what a group is judged by: its two best choice scores, or its best
  double group_mask;            // in place of the choice scores of groups that are left out; -inf: they cannot be chosen
  bool renormalize;
  double scale, eps, inverse_temperature;
  void* weight;  // [tokens, k] in the dtype of the arithmetic
  void* ids;     // [tokens, k]
  bool long_ids;
  void* log_sum_exp;  // [tokens] in the dtype of the arithmetic, or null: no statistics
};

struct TopKGateBackward {
  Elements logits;
  int64_t row_stride, experts;
  int64_t k;
  const void* ids;  // [tokens, k]
  bool long_ids;
  const void* weight;        // [tokens, k] in the dtype of the arithmetic, as are the gradients
  const void* for_weight;    // [tokens, k], or null
  const void* for_prob_sum;  // [experts], or null
  const void* for_lse;       // [tokens], or null
  bool sigmoid, renormalize;
  double scale, eps, inverse_temperature;
  void* for_logits;  // [tokens, experts] in the dtype of logits
};

// Rows are in scratch as whole pairs of sixteen lanes.
constexpr int64_t gate_row_step = 32;

static inline int64_t padded_experts(int64_t experts) { return (experts + gate_row_step - 1) / gate_row_step * gate_row_step; }

// Whether experts are chosen by scores; else by the logits, which have the same order.
static inline bool chosen_by_scores(const TopKGate& gate) {
  const bool left_out = gate.kept_groups < gate.groups;
  return gate.bias.data != nullptr || (left_out && (gate.by_two_best || gate.group_mask != -__builtin_inf()));
}

// Bytes of scratch that rows of a gate are worked on in.
static inline int64_t gate_scratch(bool wide, int64_t experts, int64_t groups) {
  return (7 * (padded_experts(experts) + gate_row_step) + 2 * padded_experts(groups)) * (wide ? 8 : 4);
}

struct TopKGateLoops {
  // Rows begin .. end. With statistics `counts` and `prob_sum` get the sums of these rows.
  void (*forward)(bool wide, const TopKGate& gate, int64_t begin, int64_t end, int32_t* counts, void* prob_sum, void* scratch);
};

struct TopKGateBackwardLoops {
  // The gradient of rows begin .. end.
  void (*backward)(bool wide, const TopKGateBackward& gate, int64_t begin, int64_t end, void* scratch);
};

TASKLOOM_LOOPS(TopKGateLoops, topk_gate_loops)
TASKLOOM_LOOPS(TopKGateBackwardLoops, topk_gate_backward_loops)

}  // namespace taskloom
