// What the wrappers of topk_gate check and share, on every device.
#pragma once

#include <optional>
#include <string>

#include "common/checks.h"
#include "gating/topk_gate.h"

namespace taskloom {

using OptionalTensor = std::optional<Tensor>;

inline bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

inline bool is_sigmoid(const std::string& score) {
  STD_TORCH_CHECK(score == "softmax" || score == "sigmoid", "score: expected softmax or sigmoid, got ", score);
  return score == "sigmoid";
}

// Rows of logits and the experts chosen from each.
struct GateShape {
  int64_t tokens, experts, k;

  GateShape(const Tensor& logits, int64_t chosen) : tokens(rows(logits)), experts(logits.size(1)), k(chosen) {
    STD_TORCH_CHECK(experts >= 1 && experts <= INT32_MAX / 2, "logits: expected 1 to ", INT32_MAX / 2, " experts, got ", experts);
    STD_TORCH_CHECK(k >= 1 && k <= most_chosen && k <= experts, "k: expected 1 to ", std::min(most_chosen, experts), ", got ", k);
  }

  static int64_t rows(const Tensor& logits) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits: expected two dimensions, got ", logits.dim());
    return logits.size(0);
  }
};

inline void check_groups(int64_t experts, int64_t k, int64_t n_group, int64_t topk_group, const std::string& group_score) {
  STD_TORCH_CHECK(n_group >= 1 && experts % n_group == 0, "n_group: expected a divisor of ", experts, ", got ", n_group);
  STD_TORCH_CHECK(topk_group >= 1 && topk_group <= n_group && topk_group * (experts / n_group) >= k,
                  "topk_group: expected groups of at least ", k, " experts together, and at most ", n_group, ", got ", topk_group);
  STD_TORCH_CHECK(group_score == "max" || group_score == "top2", "group_score: expected max or top2, got ", group_score);
  STD_TORCH_CHECK(group_score == "max" || topk_group == n_group || experts / n_group >= 2,
                  "group_score: top2 needs groups of at least two experts");
}

// The tensor itself where a row's entries are neighbours, else a contiguous copy.
inline Tensor rows_of(const Tensor& logits) { return logits.size(1) <= 1 || logits.stride(1) == 1 ? logits : contiguous_of(logits); }

inline int64_t row_stride_of(const Tensor& rows) { return rows.size(0) <= 1 ? 0 : rows.stride(0); }

// The tensors of the backward op, checked, with entries next to each other.
struct GateSlopeTensors {
  GateShape shape;
  bool wide, long_ids;
  Tensor logits, ids, weight;
  OptionalTensor for_weight, for_prob_sum, for_lse;

  GateSlopeTensors(const Tensor& values, const Tensor& places, const Tensor& weights, const OptionalTensor& dweight,
                   const OptionalTensor& dprob_sum, const OptionalTensor& dlse)
      : shape(values, chosen_of(places)),
        wide(is_double(weights)),
        long_ids(places.scalar_type() == ScalarType::Long),
        logits(rows_of(values)),
        ids(contiguous_of(places)),
        weight(contiguous_of(weights)),
        for_weight(checked(dweight, shape.tokens * shape.k, "dweight")),
        for_prob_sum(checked(dprob_sum, shape.experts, "dprob_sum")),
        for_lse(checked(dlse, shape.tokens, "dlse")) {
    STD_TORCH_CHECK(long_ids || ids.scalar_type() == ScalarType::Int, "ids: expected int32 or int64");
    check_numel(ids, shape.tokens * shape.k, "ids", "the rows of logits, times k");
    check_numel(weight, shape.tokens * shape.k, "weight", "ids");
    STD_TORCH_CHECK(wide || weight.scalar_type() == ScalarType::Float, "weight: expected float32 or float64");
    STD_TORCH_CHECK(wide || !is_double(logits), "weight: expected float64 as logits, got float32");
  }

  TopKGateBackward view(const Elements& rows, bool sigmoid, bool renormalize, double scale, double eps, double inverse_temperature,
                        const Tensor& out) const {
    const auto data = [](const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
    return {rows,
            row_stride_of(logits),
            shape.experts,
            shape.k,
            ids.const_data_ptr(),
            long_ids,
            weight.const_data_ptr(),
            data(for_weight),
            data(for_prob_sum),
            data(for_lse),
            sigmoid,
            renormalize,
            scale,
            eps,
            inverse_temperature,
            out.mutable_data_ptr()};
  }

 private:
  static int64_t chosen_of(const Tensor& places) {
    STD_TORCH_CHECK(places.dim() == 2, "ids: expected two dimensions, got ", places.dim());
    return places.size(1);
  }

  OptionalTensor checked(const OptionalTensor& slopes, int64_t numel, const char* name) const {
    if (!slopes) return std::nullopt;
    check_numel(*slopes, numel, name, "what the op found");
    STD_TORCH_CHECK(slopes->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name, ": expected the dtype of weight");
    return contiguous_of(*slopes);
  }
};

}  // namespace taskloom
