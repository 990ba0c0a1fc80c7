// sparse_merge, sparse_merge_out, sparse_merge_statistics_out: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "masked/sparse_merge_arguments.h"

namespace taskloom {
namespace {

void find_cuts(BoundMerge* bound, const ParallelFor& parallel) {
  SparseMerge& merge = bound->merge;
  if (!bound->given) {
    find_magnitude_cuts(&merge, parallel);
    return;
  }
  for (size_t t = 0; t < merge.tasks.size(); ++t) {
    const Delta delta = merge.delta(t);
    const auto first = static_cast<int64_t>(2 * t);
    merge.tasks[t].inner = bound->given->cut(first, delta, merge.numel, merge.wide(), parallel);
    merge.tasks[t].outer = bound->given->cut(first + 1, delta, merge.numel, merge.wide(), parallel);
  }
}

BoundMerge bind(const MergeArguments& arguments, const ParallelFor& parallel) {
  BoundMerge bound = bind_arguments(arguments);
  SparseMerge& merge = bound.merge;
  if (merge.select == Select::magnitude) find_cuts(&bound, parallel);
  set_rescale_factors(&merge, parallel);
  if (merge.zero_sign == 0 && merge.elect != Elect::none) {
    bound.sign_sum = elected_sign_sum(merge, parallel);
    merge.zero_sign = *bound.sign_sum < 0 ? -1 : 1;
  }
  return bound;
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
