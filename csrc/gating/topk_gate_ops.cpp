// topk_gate and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "gating/gate_arguments.h"
#include "gating/topk_gate.h"
#include "routed/run_sums.h"

namespace taskloom {
namespace {

// Rows that one piece of work takes, by their shape alone: statistics are sums of these pieces' sums.
struct Pieces {
  int64_t rows, count;

  Pieces(int64_t tokens, int64_t experts, bool statistics) {
    constexpr int64_t entries = 1 << 13, most_sums = 1 << 10;
    rows = std::max<int64_t>(1, entries / experts);
    if (statistics) rows = std::max({rows, chunk_count(tokens, most_sums), int64_t{32}});
    count = chunk_count(tokens, rows);
  }

  template <class Body>
  void run(int64_t tokens, int64_t scratch_bytes, const Body& body) const {
    torch_parallel()(count, [&](int64_t piece) {
      const ThreadScratch scratch(ScratchUse::logits, scratch_bytes);
      body(piece, piece * rows, std::min(tokens, (piece + 1) * rows), scratch.data());
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate_cpu(const Tensor& logits, OptionalTensor bias, int64_t k, Text score,
                                                                 int64_t n_group, int64_t topk_group, Text group_score, double group_mask,
                                                                 bool renormalize, double scale, double eps, double temperature,
                                                                 bool long_ids, bool statistics) {
  const GateShape shape(logits, k);
  check_groups(shape.experts, k, n_group, topk_group, group_score.value);
  const Tensor rows = rows_of(logits);
  const std::optional<Tensor> beside = bias ? std::optional<Tensor>(contiguous_of(*bias)) : std::nullopt;
  if (beside) check_numel(*beside, shape.experts, "bias", "the experts of logits");
  const bool wide = is_double(logits) || (beside && is_double(*beside));
  const ScalarType arithmetic = wide ? ScalarType::Double : ScalarType::Float;
  Tensor weight = empty_cpu({shape.tokens, k}, arithmetic);
  Tensor ids = empty_cpu({shape.tokens, k}, long_ids ? ScalarType::Long : ScalarType::Int);
  Tensor counts = empty_cpu({statistics ? shape.experts : 0}, ScalarType::Int);
  Tensor prob_sum = empty_cpu({statistics ? shape.experts : 0}, arithmetic);
  Tensor lse = empty_cpu({statistics ? shape.tokens : 0}, arithmetic);
  const TopKGate gate{elements_of(rows, "logits"),
                      row_stride_of(rows),
                      shape.experts,
                      beside ? elements_of(*beside, "bias") : Elements{},
                      k,
                      is_sigmoid(score.value),
                      n_group,
                      topk_group,
                      group_score.value == "top2",
                      group_mask,
                      renormalize,
                      scale,
                      eps,
                      1 / temperature,
                      weight.mutable_data_ptr(),
                      ids.mutable_data_ptr(),
                      long_ids,
                      statistics ? lse.mutable_data_ptr() : nullptr};
  const Pieces pieces(shape.tokens, shape.experts, statistics);
  if (statistics && pieces.count == 0) return {weight, ids, torch::stable::zero_(counts), torch::stable::zero_(prob_sum), lse};
  // A tensor takes a quarter of a microsecond: without statistics these two are others' memory, which is not written.
  Tensor piece_counts = statistics ? empty_cpu({pieces.count, shape.experts}, ScalarType::Int) : counts;
  Tensor piece_sums = statistics ? empty_cpu({pieces.count, shape.experts}, arithmetic) : prob_sum;
  auto* const counted = static_cast<int32_t*>(piece_counts.mutable_data_ptr());
  auto* const summed = static_cast<char*>(piece_sums.mutable_data_ptr());
  pieces.run(shape.tokens, gate_scratch(wide, shape.experts, n_group), [&](int64_t piece, int64_t begin, int64_t end, void* scratch) {
    const int64_t first = statistics ? piece * shape.experts : 0;
    topk_gate_loops().forward(wide, gate, begin, end, counted + first, summed + first * (wide ? 8 : 4), scratch);
  });
  if (statistics) {
    auto* const total = static_cast<int32_t*>(counts.mutable_data_ptr());
    std::copy_n(counted, shape.experts, total);
    for (int64_t piece = 1; piece < pieces.count; ++piece) {
      for (int64_t i = 0; i < shape.experts; ++i) total[i] += counted[piece * shape.experts + i];
    }
    run_sums_loops().add_up(wide, summed, pieces.count, shape.experts, shape.experts, dtype_of(prob_sum, "prob_sum"),
                            prob_sum.mutable_data_ptr(), 0);
  }
  return {weight, ids, counts, prob_sum, lse};
}

template <class Id>
void check_ids(const void* ids, int64_t count, int64_t experts) {
  const auto* const all = static_cast<const Id*>(ids);
  Id least = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, all[i]);
    most = std::max(most, all[i]);
  }
  STD_TORCH_CHECK(least >= 0 && most < experts, "ids: expected 0 to ", experts - 1, ", got ", least < 0 ? least : most);
}

Tensor topk_gate_backward_cpu(const Tensor& logits, const Tensor& ids, const Tensor& weight, OptionalTensor dweight,
                              OptionalTensor dprob_sum, OptionalTensor dlse, Text score, bool renormalize, double scale, double eps,
                              double temperature) {
  const GateSlopeTensors given(logits, ids, weight, dweight, dprob_sum, dlse);
  const GateShape& shape = given.shape;
  const int64_t chosen = shape.tokens * shape.k;
  if (given.long_ids) {
    check_ids<int64_t>(given.ids.const_data_ptr(), chosen, shape.experts);
  } else {
    check_ids<int32_t>(given.ids.const_data_ptr(), chosen, shape.experts);
  }
  Tensor out = empty_cpu({shape.tokens, shape.experts}, logits.scalar_type());
  const TopKGateBackward gate =
      given.view(elements_of(given.logits, "logits"), is_sigmoid(score.value), renormalize, scale, eps, 1 / temperature, out);
  const Pieces pieces(shape.tokens, shape.experts, false);
  pieces.run(shape.tokens, gate_scratch(given.wide, shape.experts, 0), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    topk_gate_backward_loops().backward(given.wide, gate, begin, end, scratch);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("topk_gate", TORCH_BOX(&topk_gate_cpu));
  m.impl("topk_gate_backward", TORCH_BOX(&topk_gate_backward_cpu));
}

}  // namespace taskloom
