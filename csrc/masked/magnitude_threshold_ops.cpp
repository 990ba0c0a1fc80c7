// magnitude_threshold: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "masked/magnitude_threshold.h"

namespace taskloom {
namespace {

// The threshold of every rank (float64) and how many entries equal to it belong to it (int64).
std::tuple<Tensor, Tensor> magnitude_threshold_cpu(const Tensor& tuned, std::optional<Tensor> base, std::vector<int64_t> ranks) {
  const Tensor values = torch::stable::contiguous(tuned);
  Delta delta{values.const_data_ptr(), nullptr, dtype_of(tuned, "tuned"), DType::f32};
  Tensor origin = values;
  if (base.has_value()) {
    STD_TORCH_CHECK(base->numel() == tuned.numel(), "base: expected ", tuned.numel(), " entries as in tuned, got ", base->numel());
    origin = torch::stable::contiguous(*base);
    delta.base = origin.const_data_ptr();
    delta.base_dtype = dtype_of(*base, "base");
  }
  const int64_t numel = values.numel();
  for (const int64_t rank : ranks) {
    STD_TORCH_CHECK(rank >= 1 && rank <= numel, "ranks: expected 1 <= rank <= ", numel, ", got ", rank);
  }
  const bool wide = is_wide(delta);
  const int64_t count = static_cast<int64_t>(ranks.size());
  Tensor thresholds = torch::stable::empty({count}, ScalarType::Double);
  Tensor kept = torch::stable::empty({count}, ScalarType::Long);
  auto* threshold = static_cast<double*>(thresholds.mutable_data_ptr());
  auto* ties = static_cast<int64_t*>(kept.mutable_data_ptr());
  const ParallelFor parallel = torch_parallel();
  std::vector<Threshold> found(ranks.size());
  for (int64_t i = 0; i < count; ++i) {
    // The whole tensor's cut has no threshold of its own: the smallest magnitude is the last one's.
    found[static_cast<size_t>(i)] = exact_magnitude_threshold(delta, numel, ranks[static_cast<size_t>(i)], wide, parallel);
    const int64_t bits = found[static_cast<size_t>(i)].cut.bits;
    if (wide) {
      std::memcpy(&threshold[i], &bits, sizeof bits);
    } else {
      const auto narrow = static_cast<int32_t>(bits);
      float value;
      std::memcpy(&value, &narrow, sizeof value);
      threshold[i] = static_cast<double>(value);
    }
    ties[i] = found[static_cast<size_t>(i)].equal_kept;
  }
  return {thresholds, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("magnitude_threshold", TORCH_BOX(&magnitude_threshold_cpu)); }

}  // namespace taskloom
