// sparse_merge, sparse_merge_out, sparse_merge_statistics_out: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/stable_gaps.h"
#include "masked/delta_tensors.h"
#include "masked/sparse_merge.h"

namespace taskloom {
namespace {

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
  std::optional<int64_t> sign_sum;  // where it was counted on the way

  const void* keep(const Tensor& tensor) {
    tensors.push_back(contiguous_of(tensor));
    return tensors.back().const_data_ptr();
  }
};

void check_count(size_t count, const MergeArguments& arguments, const char* name) {
  STD_TORCH_CHECK(count == arguments.tuned.size(), name, ": expected ", arguments.tuned.size(), " entries, one per task, got ", count);
}

void bind_tasks(const MergeArguments& arguments, BoundMerge* bound) {
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

void bind_bands(const MergeArguments& arguments, BoundMerge* bound, const ParallelFor& parallel) {
  SparseMerge& merge = bound->merge;
  const int64_t tasks = static_cast<int64_t>(merge.tasks.size());
  STD_TORCH_CHECK(arguments.threshold.has_value() == arguments.equal_kept.has_value(), "threshold, equal_kept: expected both or neither");
  if (arguments.threshold.has_value()) {
    const GivenCuts cuts(*arguments.threshold, *arguments.equal_kept, tasks, merge.wide());
    for (int64_t t = 0; t < tasks; ++t) {
      MergeTask& task = merge.tasks[static_cast<size_t>(t)];
      const Delta delta = merge.delta(static_cast<size_t>(t));
      task.inner = cuts.cut(2 * t, delta, merge.numel, merge.wide(), parallel);
      task.outer = cuts.cut(2 * t + 1, delta, merge.numel, merge.wide(), parallel);
    }
    return;
  }
  check_count(arguments.rank_begin.size(), arguments, "rank_begin");
  check_count(arguments.rank_end.size(), arguments, "rank_end");
  const int64_t length = arguments.by_row ? merge.row_length : merge.numel;
  for (size_t t = 0; t < merge.tasks.size(); ++t) {
    const int64_t begin = arguments.rank_begin[t], end = arguments.rank_end[t];
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= length, "rank: expected 0 <= rank_begin <= rank_end <= ", length, ", got ", begin,
                    " and ", end);
    merge.tasks[t].rank_begin = begin;
    merge.tasks[t].rank_end = end;
  }
  // One row is spread over the threads as a tensor is.
  if (arguments.by_row && merge.row_length != merge.numel) {
    merge.select = Select::row_magnitude;
  } else {
    find_magnitude_cuts(&merge, parallel);
  }
}

void bind_masks(const MergeArguments& arguments, BoundMerge* bound) {
  check_count(arguments.masks.size(), arguments, "masks");
  for (size_t t = 0; t < arguments.masks.size(); ++t) {
    check_dtype(arguments.masks[t], ScalarType::Byte, "masks", "uint8");
    const int64_t bytes = (bound->merge.numel + 7) / 8;
    STD_TORCH_CHECK(arguments.masks[t].numel() == bytes, "masks: expected ", bytes, " bytes, got ", arguments.masks[t].numel());
    bound->merge.tasks[t].mask = static_cast<const uint8_t*>(bound->keep(arguments.masks[t]));
  }
}

void bind_probabilities(const MergeArguments& arguments, SparseMerge* merge) {
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

void bind_selection(const MergeArguments& arguments, BoundMerge* bound, const ParallelFor& parallel) {
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
  if (merge.select == Select::magnitude) bind_bands(arguments, bound, parallel);
  if (merge.select == Select::mask) bind_masks(arguments, bound);
  if (merge.select == Select::dropout || merge.select == Select::rank_dropout) bind_probabilities(arguments, &merge);
}

BoundMerge bind(const MergeArguments& arguments, const ParallelFor& parallel) {
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
  bind_selection(arguments, &bound, parallel);
  set_rescale_factors(&merge, parallel);
  merge.zero_sign = static_cast<int>(arguments.zero_sign);
  if (arguments.zero_sign == 0 && merge.elect != Elect::none) {
    bound.sign_sum = elected_sign_sum(merge, parallel);
    merge.zero_sign = *bound.sign_sum < 0 ? -1 : 1;
  }
  return bound;
}

// Whether writing entry i of `out` after reading entry i of every tensor cannot change an entry that is read later.
bool writable_in_place(const Tensor& out, const std::vector<Tensor>& tensors) {
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

MergeStatistics merge_into(BoundMerge* given, Tensor out, const ParallelFor& parallel) {
  BoundMerge& bound = *given;
  STD_TORCH_CHECK(out.numel() == bound.merge.numel, "out: expected ", bound.merge.numel, " entries, got ", out.numel());
  bound.merge.out_dtype = dtype_of(out, "out");
  const bool direct = writable_in_place(out, bound.tensors);
  Tensor target = direct ? out : empty_cpu(out.sizes(), out.scalar_type());
  MergeOutput output;
  output.data = target.mutable_data_ptr();
  MergeStatistics statistics = sparse_merge(bound.merge, output, parallel);
  if (!direct) torch::stable::copy_(out, target);
  return statistics;
}

void merge_into(const MergeArguments& arguments, Tensor out) {
  const ParallelFor parallel = torch_parallel();
  BoundMerge bound = bind(arguments, parallel);
  merge_into(&bound, out, parallel);
}

template <class T>
Tensor tensor_of(std::initializer_list<int64_t> sizes, ScalarType dtype, const std::vector<T>& values) {
  Tensor made = torch::stable::empty(sizes, dtype);
  std::copy(values.begin(), values.end(), static_cast<T*>(made.mutable_data_ptr()));
  return made;
}

std::vector<double> square_of(const std::vector<double>& upper, size_t tasks) {
  std::vector<double> square(tasks * tasks);
  auto next = upper.begin();
  for (size_t row = 0; row < tasks; ++row) {
    for (size_t column = row; column < tasks; ++column, ++next) square[row * tasks + column] = square[column * tasks + row] = *next;
  }
  return square;
}

Tensor sparse_merge_cpu(std::optional<Tensor> base, std::vector<Tensor> tuned, std::vector<double> weight, Text select, bool by_row,
                        std::vector<int64_t> rank_begin, std::vector<int64_t> rank_end, std::optional<Tensor> threshold,
                        std::optional<Tensor> equal_kept, std::vector<Tensor> masks, std::vector<double> density,
                        std::vector<double> epsilon, int64_t seed, int64_t key, Text rescale, Text elect, int64_t zero_sign, Text vote,
                        int64_t consensus_k, std::vector<double> tall_mask_lambda, Text combine, double scale, ScalarType dtype) {
  STD_TORCH_CHECK(!tuned.empty(), "tuned: expected at least one tensor");
  Tensor out = empty_cpu(tuned.front().sizes(), dtype);
  merge_into(
      {base,    tuned, weight, select.value,  by_row,      rank_begin, rank_end,   threshold,   equal_kept,       masks,         density,
       epsilon, seed,  key,    rescale.value, elect.value, zero_sign,  vote.value, consensus_k, tall_mask_lambda, combine.value, scale},
      out);
  return out;
}

void sparse_merge_out_cpu(std::optional<Tensor> base, std::vector<Tensor> tuned, std::vector<double> weight, Text select, bool by_row,
                          std::vector<int64_t> rank_begin, std::vector<int64_t> rank_end, std::optional<Tensor> threshold,
                          std::optional<Tensor> equal_kept, std::vector<Tensor> masks, std::vector<double> density,
                          std::vector<double> epsilon, int64_t seed, int64_t key, Text rescale, Text elect, int64_t zero_sign, Text vote,
                          int64_t consensus_k, std::vector<double> tall_mask_lambda, Text combine, double scale, Tensor out) {
  merge_into(
      {base,    tuned, weight, select.value,  by_row,      rank_begin, rank_end,   threshold,   equal_kept,       masks,         density,
       epsilon, seed,  key,    rescale.value, elect.value, zero_sign,  vote.value, consensus_k, tall_mask_lambda, combine.value, scale},
      out);
}

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics sparse_merge_statistics_out_cpu(std::optional<Tensor> base, std::vector<Tensor> tuned, std::vector<double> weight, Text select,
                                           bool by_row, std::vector<int64_t> rank_begin, std::vector<int64_t> rank_end,
                                           std::optional<Tensor> threshold, std::optional<Tensor> equal_kept, std::vector<Tensor> masks,
                                           std::vector<double> density, std::vector<double> epsilon, int64_t seed, int64_t key,
                                           Text rescale, Text elect, int64_t zero_sign, Text vote, int64_t consensus_k,
                                           std::vector<double> tall_mask_lambda, Text combine, double scale, Tensor out) {
  const ParallelFor parallel = torch_parallel();
  BoundMerge bound = bind(
      {base,    tuned, weight, select.value,  by_row,      rank_begin, rank_end,   threshold,   equal_kept,       masks,         density,
       epsilon, seed,  key,    rescale.value, elect.value, zero_sign,  vote.value, consensus_k, tall_mask_lambda, combine.value, scale},
      parallel);
  bound.merge.statistics = bound.merge.exact_dots = true;
  // Before the merge, which may write over a tensor that it reads.
  if (!bound.sign_sum) bound.sign_sum = bound.merge.elect == Elect::none ? 0 : elected_sign_sum(bound.merge, parallel);
  const MergeStatistics counted = merge_into(&bound, out, parallel);
  const auto tasks = static_cast<int64_t>(tuned.size());
  return {tensor_of<int64_t>({tasks}, ScalarType::Long, counted.kept), tensor_of<int64_t>({}, ScalarType::Long, {counted.conflicts}),
          tensor_of<double>({tasks, tasks}, ScalarType::Double, square_of(counted.dots, tuned.size())),
          tensor_of<uint8_t>({}, ScalarType::Bool, {static_cast<uint8_t>(counted.nonfinite)}),
          tensor_of<int64_t>({}, ScalarType::Long, {*bound.sign_sum})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("sparse_merge", TORCH_BOX(&sparse_merge_cpu));
  m.impl("sparse_merge_out", TORCH_BOX(&sparse_merge_out_cpu));
  m.impl("sparse_merge_statistics_out", TORCH_BOX(&sparse_merge_statistics_out_cpu));
}

}  // namespace taskloom
