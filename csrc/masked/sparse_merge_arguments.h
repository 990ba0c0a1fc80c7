// The arguments of the sparse_merge ops, checked and bound to a SparseMerge. What has to be found from the tensors' entries is left to the
// device: cuts of magnitudes, L1 factors, the majority's sign.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/stable_gaps.h"
#include "masked/delta_tensors.h"
#include "masked/sparse_merge.h"

namespace taskloom {

template <class Enum>
Enum named(const std::string& value, std::initializer_list<std::pair<const char*, Enum>> names, const char* argument) {
  for (const auto& [name, entry] : names) {
    if (value == name) return entry;
  }
  STD_TORCH_CHECK(false, argument, ": unknown value '", value, "'");
  return names.begin()->second;
}

// The arguments of all three ops, in the order of their schemas.
struct MergeArguments {
  std::optional<Tensor> base;
  std::vector<Tensor> tuned;
  std::vector<double> weight;
  std::string select;
  bool by_row;
  std::vector<int64_t> rank_begin, rank_end;
  std::optional<Tensor> threshold, equal_kept;
  std::vector<Tensor> masks;
  std::vector<double> density, epsilon;
  int64_t seed, key;
  std::string rescale, elect;
  int64_t zero_sign;
  std::string vote;
  int64_t consensus_k;
  std::vector<double> tall_mask_lambda;
  std::string combine;
  double scale;
};

// A merge with its tensors contiguous, and kept alive while it runs.
struct BoundMerge {
  SparseMerge merge;
  std::vector<Tensor> tensors;
  std::optional<GivenCuts> given;   // of select "magnitude", in place of ranks
  std::optional<int64_t> sign_sum;  // where it was counted on the way

  const void* keep(const Tensor& tensor) {
    tensors.push_back(contiguous_of(tensor));
    return tensors.back().const_data_ptr();
  }
};

inline void check_count(size_t count, const MergeArguments& arguments, const char* name) {
  STD_TORCH_CHECK(count == arguments.tuned.size(), name, ": expected ", arguments.tuned.size(), " entries, one per task, got ", count);
}

inline void bind_tasks(const MergeArguments& arguments, BoundMerge* bound) {
  SparseMerge& merge = bound->merge;
  check_count(arguments.weight.size(), arguments, "weight");
  merge.numel = arguments.tuned.front().numel();
  for (size_t t = 0; t < arguments.tuned.size(); ++t) {
    const Tensor& tuned = arguments.tuned[t];
    STD_TORCH_CHECK(tuned.numel() == merge.numel, "tuned: expected ", merge.numel, " entries in each tensor, got ", tuned.numel());
    MergeTask task;
    task.dtype = dtype_of(tuned, "tuned");
    task.tuned = bound->keep(tuned);
    task.weight = arguments.weight[t];
    task.key = static_cast<uint64_t>(arguments.key) + t * task_key_step;
    merge.tasks.push_back(task);
  }
  if (!arguments.base.has_value()) return;
  STD_TORCH_CHECK(arguments.base->numel() == merge.numel, "base: expected ", merge.numel, " entries as in tuned, got ",
                  arguments.base->numel());
  merge.base_dtype = dtype_of(*arguments.base, "base");
  merge.base = bound->keep(*arguments.base);
}

inline void bind_ranks(const MergeArguments& arguments, BoundMerge* bound) {
  SparseMerge& merge = bound->merge;
  STD_TORCH_CHECK(arguments.threshold.has_value() == arguments.equal_kept.has_value(), "threshold, equal_kept: expected both or neither");
  if (arguments.threshold.has_value()) {
    bound->given.emplace(*arguments.threshold, *arguments.equal_kept, static_cast<int64_t>(merge.tasks.size()), merge.wide());
    return;
  }
  check_count(arguments.rank_begin.size(), arguments, "rank_begin");
  check_count(arguments.rank_end.size(), arguments, "rank_end");
  // Rows of which there are none have a length too.
  const Tensor& first = arguments.tuned[0];
  const int64_t row = first.dim() == 0 ? 1 : first.size(first.dim() - 1);
  const int64_t length = arguments.by_row ? row : merge.numel;
  for (size_t t = 0; t < merge.tasks.size(); ++t) {
    const int64_t begin = arguments.rank_begin[t], end = arguments.rank_end[t];
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= length, "rank: expected 0 <= rank_begin <= rank_end <= ", length, ", got ", begin,
                    " and ", end);
    merge.tasks[t].rank_begin = merge.numel == 0 ? 0 : begin;
    merge.tasks[t].rank_end = merge.numel == 0 ? 0 : end;
  }
  // One row is spread over the device's threads as a tensor is.
  if (arguments.by_row && merge.row_length != merge.numel) merge.select = Select::row_magnitude;
}

inline void bind_masks(const MergeArguments& arguments, BoundMerge* bound) {
  check_count(arguments.masks.size(), arguments, "masks");
  for (size_t t = 0; t < arguments.masks.size(); ++t) {
    check_dtype(arguments.masks[t], ScalarType::Byte, "masks", "uint8");
    const int64_t bytes = (bound->merge.numel + 7) / 8;
    STD_TORCH_CHECK(arguments.masks[t].numel() == bytes, "masks: expected ", bytes, " bytes, got ", arguments.masks[t].numel());
    bound->merge.tasks[t].mask = static_cast<const uint8_t*>(bound->keep(arguments.masks[t]));
  }
}

inline void bind_probabilities(const MergeArguments& arguments, SparseMerge* merge) {
  check_count(arguments.density.size(), arguments, "density");
  if (merge->select == Select::rank_dropout) {
    check_count(arguments.epsilon.size(), arguments, "epsilon");
    STD_TORCH_CHECK(merge->row_length <= longest_ranked_row, "tuned: expected rows of at most ", longest_ranked_row,
                    " entries to be ranked, got ", merge->row_length);
  }
  for (size_t t = 0; t < merge->tasks.size(); ++t) {
    MergeTask& task = merge->tasks[t];
    task.density = arguments.density[t];
    task.epsilon = merge->select == Select::rank_dropout ? arguments.epsilon[t] : 0;
    STD_TORCH_CHECK(task.epsilon >= 0 && task.density - task.epsilon >= 0 && task.density + task.epsilon <= 1,
                    "density: expected density - epsilon and density + epsilon in [0, 1], got ", task.density, " and ", task.epsilon);
  }
}

inline void bind_selection(const MergeArguments& arguments, BoundMerge* bound) {
  SparseMerge& merge = bound->merge;
  merge.select = named<Select>(arguments.select,
                               {{"all", Select::all},
                                {"magnitude", Select::magnitude},
                                {"mask", Select::mask},
                                {"dropout", Select::dropout},
                                {"rank_dropout", Select::rank_dropout}},
                               "select");
  const Tensor& first = arguments.tuned.front();
  merge.row_length = merge.numel == 0 ? 0 : first.dim() == 0 ? 1 : first.size(first.dim() - 1);
  merge.seed = static_cast<uint64_t>(arguments.seed);
  if (merge.select == Select::magnitude) bind_ranks(arguments, bound);
  if (merge.select == Select::mask) bind_masks(arguments, bound);
  if (merge.select == Select::dropout || merge.select == Select::rank_dropout) bind_probabilities(arguments, &merge);
}

inline BoundMerge bind_arguments(const MergeArguments& arguments) {
  STD_TORCH_CHECK(!arguments.tuned.empty(), "tuned: expected at least one tensor");
  BoundMerge bound;
  SparseMerge& merge = bound.merge;
  merge.rescale =
      named<Rescale>(arguments.rescale, {{"none", Rescale::none}, {"density", Rescale::density}, {"l1", Rescale::l1}}, "rescale");
  merge.elect =
      named<Elect>(arguments.elect, {{"none", Elect::none}, {"sign_sum", Elect::sign_sum}, {"sign_count", Elect::sign_count}}, "elect");
  merge.vote = named<Vote>(arguments.vote, {{"none", Vote::none}, {"selected", Vote::selected}, {"tall", Vote::tall}}, "vote");
  merge.combine = named<Combine>(
      arguments.combine, {{"sum", Combine::sum}, {"weighted_mean", Combine::weighted_mean}, {"disjoint_mean", Combine::disjoint_mean}},
      "combine");
  STD_TORCH_CHECK(arguments.zero_sign >= -1 && arguments.zero_sign <= 1, "zero_sign: expected -1, 0 or 1, got ", arguments.zero_sign);
  STD_TORCH_CHECK(arguments.consensus_k >= 0 && arguments.consensus_k <= INT32_MAX, "consensus_k: expected a number of tasks, got ",
                  arguments.consensus_k);
  merge.consensus_k = static_cast<int>(arguments.consensus_k);
  merge.scale = arguments.scale;
  bind_tasks(arguments, &bound);
  if (merge.vote == Vote::tall) {
    check_count(arguments.tall_mask_lambda.size(), arguments, "tall_mask_lambda");
    for (size_t t = 0; t < merge.tasks.size(); ++t) merge.tasks[t].tall_mask_lambda = arguments.tall_mask_lambda[t];
  }
  bind_selection(arguments, &bound);
  merge.zero_sign = static_cast<int>(arguments.zero_sign);
  return bound;
}

// Whether writing entry i of `out` after reading entry i of every tensor cannot change an entry that is read later.
inline bool writable_in_place(const Tensor& out, const std::vector<Tensor>& tensors) {
  if (!out.is_contiguous()) return false;
  const auto* begin = static_cast<const char*>(out.const_data_ptr());
  const auto* end = begin + out.numel() * static_cast<int64_t>(out.element_size());
  for (const Tensor& tensor : tensors) {
    const auto* other = static_cast<const char*>(tensor.const_data_ptr());
    const auto* other_end = other + tensor.numel() * static_cast<int64_t>(tensor.element_size());
    const bool same = other == begin && tensor.scalar_type() == out.scalar_type();
    if (!same && other < end && begin < other_end) return false;
  }
  return true;
}

}  // namespace taskloom
