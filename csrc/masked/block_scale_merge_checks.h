// What block_scale_merge and its backward ask of their arguments, on every device.
#pragma once

#include <vector>

#include "common/checks.h"

namespace taskloom {

// Checks the blocks of one call, whose deltas lie task by task, and returns the number of tasks.
inline int64_t check_scale_blocks(const std::vector<Tensor>& base, const char* base_name, const std::vector<Tensor>& deltas,
                                  const std::vector<Tensor>& partition, int64_t groups) {
  const size_t count = base.size();
  STD_TORCH_CHECK(count > 0 && deltas.size() % count == 0, "deltas: expected ", count, " tensors for each task, got ", deltas.size());
  STD_TORCH_CHECK(groups >= 1 && groups <= 256, "groups: expected 1 to 256, got ", groups);
  STD_TORCH_CHECK(partition.empty() || partition.size() == count, "partition: expected ", count, " tensors, got ", partition.size());
  for (const Tensor& one : base) dtype_of(one, base_name);
  for (size_t i = 0; i < deltas.size(); ++i) {
    dtype_of(deltas[i], "deltas");
    check_numel(deltas[i], base[i % count].numel(), "deltas", base_name);
  }
  for (size_t b = 0; b < partition.size(); ++b) {
    check_dtype(partition[b], ScalarType::Byte, "partition", "uint8");
    check_numel(partition[b], base[b].numel(), "partition", base_name);
  }
  return static_cast<int64_t>(deltas.size() / count);
}

inline void check_scale_coef(const Tensor& coef, int64_t tasks, int64_t blocks) {
  STD_TORCH_CHECK(coef.size(0) == tasks && coef.size(1) == blocks, "coef: expected shape [", tasks, ", ", blocks, ", groups], got [",
                  coef.size(0), ", ", coef.size(1), ", ", coef.size(2), "]");
  const DType dtype = dtype_of(coef, "coef");
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "coef: expected a float32 or float64 tensor");
}

}  // namespace taskloom
