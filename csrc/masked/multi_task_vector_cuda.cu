// multi_task_vector: CUDA kernel. Bytes moved: base and each task's tensor in, once each, and the sum out; any number of tasks in one
// launch.
#include <vector>

#include "common/checks.h"
#include "common/cuda_fetch.h"
#include "common/cuda_launch.h"
#include "common/cuda_table.h"

namespace taskloom {
namespace {

struct WeightedTask {
  DeviceValues tuned;
  double weight;
};

template <class Acc>
__global__ void __launch_bounds__(cuda_threads)
    multi_task_vector_kernel(DeviceValues base, const WeightedTask* __restrict__ tasks, int64_t count, int64_t numel, DeviceValues out) {
  const int64_t groups = (numel + vector_entries - 1) / vector_entries;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const int64_t begin = group * vector_entries;
    Acc origin[vector_entries], sum[vector_entries] = {};
    load_eight(base, begin, numel, origin);
    each_eight<Acc>(
        count, begin, numel, [&](int64_t task) { return tasks[task].tuned; },
        [&](int64_t task, const Acc(&tuned)[vector_entries]) {
          const auto weight = static_cast<Acc>(tasks[task].weight);
#pragma unroll
          for (int i = 0; i < vector_entries; ++i) sum[i] += weight * (tuned[i] - origin[i]);
        });
    store_eight(out, begin, numel, sum);
  }
}

Tensor multi_task_vector_cuda(const Tensor& base, std::vector<Tensor> tuned, std::vector<double> weight) {
  const int64_t numel = base.numel(), groups = (numel + vector_entries - 1) / vector_entries;
  STD_TORCH_CHECK(!tuned.empty() && weight.size() == tuned.size(), "weight: expected one for each of ", tuned.size(),
                  " tasks (at least 1), got ", weight.size());
  const Tensor flat_base = contiguous_of(base);
  const DeviceValues origin = device_values(flat_base, "base");
  bool wide = origin.dtype == DType::f64;
  std::vector<Tensor> flat;
  std::vector<WeightedTask> tasks;
  for (size_t task = 0; task < tuned.size(); ++task) {
    check_numel(tuned[task], numel, "tuned", "base");
    flat.push_back(contiguous_of(tuned[task]));
    tasks.push_back({device_values(flat.back(), "tuned"), weight[task]});
    wide = wide || tasks.back().tuned.dtype == DType::f64;
  }
  Tensor out = torch::stable::new_empty(base, base.sizes(), wide ? ScalarType::Double : ScalarType::Float);
  const Tensor table = device_table(out, tasks);
  launch_striding(out, groups, wide ? multi_task_vector_kernel<double> : multi_task_vector_kernel<float>, origin,
                  rows_of<WeightedTask>(table), static_cast<int64_t>(tasks.size()), numel, device_values(out, "out"));
  return out;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("multi_task_vector", TORCH_BOX(&multi_task_vector_cuda)); }

}  // namespace taskloom
