// The tensors of a delta as the wrappers get them: contiguous, checked, and kept alive while a kernel reads them.
#pragma once

#include <cstring>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "masked/magnitude_threshold.h"

namespace taskloom {

struct DeltaTensors {
  Tensor tuned;
  std::optional<Tensor> base;
  int64_t numel;
  int64_t row_length;  // of the last dimension; 1 without one

  DeltaTensors(const Tensor& values, const std::optional<Tensor>& origin)
      : tuned(contiguous_of(values)), numel(values.numel()), row_length(values.dim() == 0 ? 1 : values.size(values.dim() - 1)) {
    if (!origin.has_value()) return;
    STD_TORCH_CHECK(origin->numel() == numel, "base: expected ", numel, " entries as in tuned, got ", origin->numel());
    base = contiguous_of(*origin);
  }

  Delta delta() const {
    return {tuned.const_data_ptr(), base.has_value() ? base->const_data_ptr() : nullptr, dtype_of(tuned, "tuned"),
            base.has_value() ? dtype_of(*base, "base") : DType::f32};
  }

  int64_t rows() const {
    int64_t rows = 1;
    for (int64_t dimension = 0; dimension + 1 < tuned.dim(); ++dimension) rows *= tuned.size(dimension);
    return rows;
  }
};

// The magnitude bits that entry `index` of a float32 or float64 tensor of thresholds stands for; its sign counts for nothing.
inline int64_t threshold_bits(const Tensor& threshold, int64_t index, bool wide) {
  const void* data = threshold.const_data_ptr();
  if (dtype_of(threshold, "threshold") == DType::f64) {
    int64_t bits;
    std::memcpy(&bits, static_cast<const double*>(data) + index, sizeof bits);
    return bits & INT64_MAX;
  }
  const float value = static_cast<const float*>(data)[index];
  if (wide) {
    const double widened = value;
    int64_t bits;
    std::memcpy(&bits, &widened, sizeof bits);
    return bits & INT64_MAX;
  }
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & INT32_MAX;
}

// Writes magnitude bits as entry `index` of a tensor of thresholds (float64 where wide, else float32).
inline void store_threshold(void* thresholds, int64_t index, int64_t bits, bool wide) {
  if (wide) {
    std::memcpy(static_cast<double*>(thresholds) + index, &bits, sizeof bits);
  } else {
    const auto narrow = static_cast<int32_t>(bits);
    std::memcpy(static_cast<float*>(thresholds) + index, &narrow, sizeof narrow);
  }
}

// One task's cuts as tensors give them: contiguous [.., 2] thresholds of (rank_begin, rank_end) and how many equal ones are kept.
struct GivenCuts {
  Tensor threshold, equal_kept;

  GivenCuts(const Tensor& thresholds, const Tensor& kept, int64_t tasks, bool wide)
      : threshold(contiguous_of(thresholds)), equal_kept(contiguous_of(kept)) {
    const DType dtype = dtype_of(threshold, "threshold");
    STD_TORCH_CHECK(dtype == DType::f32 || (wide && dtype == DType::f64),
                    "threshold: expected float32 (or float64 where a tensor is float64)");
    check_dtype(equal_kept, ScalarType::Long, "equal_kept", "int64");
    STD_TORCH_CHECK(threshold.numel() == 2 * tasks && equal_kept.numel() == 2 * tasks, "threshold, equal_kept: expected ", 2 * tasks,
                    " entries");
  }

  Cut cut(int64_t index, const Delta& delta, int64_t numel, bool wide, const ParallelFor& parallel) const {
    const int64_t kept = static_cast<const int64_t*>(equal_kept.const_data_ptr())[index];
    return cut_of_threshold(delta, numel, threshold_bits(threshold, index, wide), kept, wide, parallel);
  }
};

}  // namespace taskloom
