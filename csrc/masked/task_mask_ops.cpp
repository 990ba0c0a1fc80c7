// task_mask: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/checks.h"
#include "masked/task_mask.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

Tensor task_mask_cpu(const Tensor& base, const Tensor& tuned, const Tensor& multi_task_vector, double tall_mask_lambda) {
  const int64_t numel = base.numel();
  check_numel(tuned, numel, "tuned", "base");
  check_numel(multi_task_vector, numel, "multi_task_vector", "base");
  const Tensor flat_base = contiguous_of(base);
  const Tensor flat_tuned = contiguous_of(tuned);
  const Tensor flat_vector = contiguous_of(multi_task_vector);
  const TaskMask task{elements_of(flat_base, "base"), elements_of(flat_tuned, "tuned"), elements_of(flat_vector, "multi_task_vector"),
                      tall_mask_lambda};
  const bool wide = task.base.dtype == DType::f64 || task.tuned.dtype == DType::f64 || task.multi_task_vector.dtype == DType::f64;
  Tensor packed = empty_cpu({(numel + 7) / 8}, ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    task_mask_loops().mask(wide, task, begin, std::min(chunk, numel - begin), to);
  });
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("task_mask", TORCH_BOX(&task_mask_cpu)); }

}  // namespace taskloom
