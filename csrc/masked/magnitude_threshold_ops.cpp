// magnitude_threshold, magnitude_histogram: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "masked/delta_tensors.h"

namespace taskloom {
namespace {

// Ranks whose thresholds are found in one pass; each takes a chunk of scratch per thread.
constexpr int64_t ranks_at_once = 4;

std::vector<Threshold> thresholds_of_tensor(const Delta& delta, int64_t numel, const std::vector<int64_t>& ranks, bool wide,
                                            const ParallelFor& parallel) {
  std::vector<Threshold> found;
  const int64_t count = static_cast<int64_t>(ranks.size());
  for (int64_t first = 0; first < count; first += ranks_at_once) {
    const int cuts = static_cast<int>(std::min(ranks_at_once, count - first));
    const std::vector<Threshold> some = magnitude_thresholds(&delta, 1, numel, ranks.data() + first, cuts, wide, default_room, parallel);
    found.insert(found.end(), some.begin(), some.end());
  }
  // The cut of a whole tensor needs no threshold; the caller wants the smallest magnitude all the same.
  for (int64_t i = 0; i < count; ++i) {
    const int64_t rank = ranks[static_cast<size_t>(i)];
    if (rank == numel && rank > 0) found[static_cast<size_t>(i)] = exact_magnitude_threshold(delta, numel, rank, wide, parallel);
  }
  return found;
}

// The smallest magnitude of all segments, all entries equal to it kept.
Threshold smallest(const std::vector<DeltaSegment>& segments, int64_t total, bool wide, const ParallelFor& parallel) {
  Threshold least{{INT64_MAX, INT64_MAX}, 0, 0, 0};
  for (const DeltaSegment& segment : segments) {
    if (segment.numel == 0) continue;
    const Threshold own = exact_magnitude_threshold(segment.delta, segment.numel, segment.numel, wide, parallel);
    const int64_t equal = own.equal + (own.cut.bits == least.cut.bits ? least.equal : 0);
    if (own.cut.bits <= least.cut.bits) least = {own.cut, total - equal, equal, equal};
  }
  return least;
}

std::vector<Threshold> thresholds_of_list(const std::vector<DeltaSegment>& segments, int64_t total, const std::vector<int64_t>& ranks,
                                          bool wide, const ParallelFor& parallel) {
  std::vector<int64_t> tie_ends;
  std::vector<Threshold> found = joint_magnitude_thresholds(segments, ranks, &tie_ends, parallel, wide);
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] == total && total > 0) found[i] = smallest(segments, total, wide, parallel);
  }
  return found;
}

std::tuple<Tensor, Tensor> magnitude_threshold_cpu(std::vector<Tensor> tuned, std::vector<Tensor> base, std::vector<int64_t> ranks,
                                                   bool by_row) {
  STD_TORCH_CHECK(!tuned.empty(), "tuned: expected at least one tensor");
  STD_TORCH_CHECK(base.empty() || base.size() == tuned.size(), "base: expected ", tuned.size(), " tensors, got ", base.size());
  STD_TORCH_CHECK(!by_row || tuned.size() == 1, "tuned: rows are of one tensor, got ", tuned.size());
  std::vector<DeltaTensors> tensors;
  std::vector<DeltaSegment> segments;
  bool wide = false;
  int64_t total = 0;
  for (size_t i = 0; i < tuned.size(); ++i) {
    tensors.emplace_back(tuned[i], base.empty() ? std::nullopt : std::make_optional(base[i]));
    segments.push_back({tensors.back().delta(), tensors.back().numel});
    wide = wide || is_wide(segments.back().delta);
    total += tensors.back().numel;
  }
  const int64_t length = by_row ? tensors.front().row_length : total;
  for (const int64_t rank : ranks) {
    STD_TORCH_CHECK(rank >= 0 && rank <= length, "rank: expected 0 <= rank <= ", length, ", got ", rank);
  }
  const int64_t cuts = static_cast<int64_t>(ranks.size());
  const int64_t rows = by_row ? tensors.front().rows() : 1;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor thresholds = by_row ? empty_cpu({rows, cuts}, dtype) : empty_cpu({cuts}, dtype);
  Tensor kept = by_row ? empty_cpu({rows, cuts}, ScalarType::Long) : empty_cpu({cuts}, ScalarType::Long);
  const ParallelFor parallel = torch_parallel();
  const Delta& first = segments.front().delta;
  // One row is spread over the threads as a tensor is.
  const std::vector<Threshold> found =
      by_row && rows != 1    ? row_magnitude_thresholds(first, rows, length, ranks.data(), static_cast<int>(cuts), wide, parallel)
      : segments.size() == 1 ? thresholds_of_tensor(first, total, ranks, wide, parallel)
                             : thresholds_of_list(segments, total, ranks, wide, parallel);
  void* threshold = thresholds.mutable_data_ptr();
  auto* equal_kept = static_cast<int64_t*>(kept.mutable_data_ptr());
  for (int64_t i = 0; i < rows * cuts; ++i) {
    store_threshold(threshold, i, found[static_cast<size_t>(i)].cut.bits, wide);
    equal_kept[i] = found[static_cast<size_t>(i)].equal_kept;
  }
  return {thresholds, kept};
}

Tensor magnitude_histogram_cpu(const Tensor& tuned, std::optional<Tensor> base, int64_t shift, int64_t prefix, bool wide) {
  const DeltaTensors tensors(tuned, base);
  const Delta delta = tensors.delta();
  STD_TORCH_CHECK(wide || !is_wide(delta), "wide: float64 tensors are compared in float64");
  STD_TORCH_CHECK(shift == 0 || shift == 16 || (wide && (shift == 32 || shift == 48)),
                  "shift: expected 0 or 16 (or 32 or 48 where wide), got ", shift);
  Tensor counts = torch::stable::full({histogram_bins}, 0, ScalarType::Long);
  add_magnitude_histogram(delta, wide, tensors.numel, static_cast<int>(shift), prefix, static_cast<int64_t*>(counts.mutable_data_ptr()),
                          default_room, torch_parallel());
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("magnitude_threshold", TORCH_BOX(&magnitude_threshold_cpu));
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram_cpu));
}

}  // namespace taskloom
