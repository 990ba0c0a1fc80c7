// task_mask: CUDA kernel. Bytes moved: base, tuned and multi_task_vector in, a bit an entry out; each thread makes one byte of the mask.
#include "common/checks.h"
#include "common/cuda_fetch.h"
#include "common/cuda_launch.h"

namespace taskloom {
namespace {

template <class Acc>
__device__ Acc magnitude(Acc value) {
  return value < 0 ? -value : value;
}

template <class Acc>
__global__ void __launch_bounds__(cuda_threads)
    task_mask_kernel(DeviceValues base, DeviceValues tuned, DeviceValues sum, Acc lambda, int64_t numel, uint8_t* __restrict__ packed) {
  const int64_t groups = (numel + vector_entries - 1) / vector_entries;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const int64_t begin = group * vector_entries;
    Fetched<Acc> fetched_base, fetched_tuned, fetched_sum;
    fetch_eight(base, begin, numel, fetched_base);
    fetch_eight(tuned, begin, numel, fetched_tuned);
    fetch_eight(sum, begin, numel, fetched_sum);
    Acc origin[vector_entries], moved[vector_entries], together[vector_entries];
    convert_eight(base, fetched_base, origin);
    convert_eight(tuned, fetched_tuned, moved);
    convert_eight(sum, fetched_sum, together);
    uint32_t chosen = 0;
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      const Acc delta = moved[i] - origin[i];
      const Acc bound = lambda * magnitude(together[i] - delta);
      // Entries from numel on are 0, and 0 > 0 sets no bit.
      chosen |= (magnitude(delta) > bound ? 1u : 0u) << i;
    }
    packed[group] = static_cast<uint8_t>(chosen);
  }
}

Tensor task_mask_cuda(const Tensor& base, const Tensor& tuned, const Tensor& multi_task_vector, double tall_mask_lambda) {
  const int64_t numel = base.numel(), groups = (numel + vector_entries - 1) / vector_entries;
  check_numel(tuned, numel, "tuned", "base");
  check_numel(multi_task_vector, numel, "multi_task_vector", "base");
  const Tensor flat_base = contiguous_of(base), flat_tuned = contiguous_of(tuned);
  const Tensor flat_sum = contiguous_of(multi_task_vector);
  const DeviceValues origin = device_values(flat_base, "base"), moved = device_values(flat_tuned, "tuned");
  const DeviceValues sum = device_values(flat_sum, "multi_task_vector");
  Tensor packed = torch::stable::new_empty(flat_base, {groups}, ScalarType::Byte);
  auto* const to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  if (origin.dtype == DType::f64 || moved.dtype == DType::f64 || sum.dtype == DType::f64) {
    launch_striding(packed, groups, task_mask_kernel<double>, origin, moved, sum, tall_mask_lambda, numel, to);
  } else {
    launch_striding(packed, groups, task_mask_kernel<float>, origin, moved, sum, static_cast<float>(tall_mask_lambda), numel, to);
  }
  return packed;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("task_mask", TORCH_BOX(&task_mask_cuda)); }

}  // namespace taskloom
