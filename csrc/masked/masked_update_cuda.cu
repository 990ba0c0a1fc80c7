// masked_update, masked_update_: CUDA kernels. Bytes moved: target, delta and mask in, target out; in place, groups of eight entries of
// which none is set cost their mask's byte alone.
#include "common/cuda_entries.h"
#include "common/cuda_launch.h"
#include "common/cuda_mask.h"
#include "masked/mask_checks.h"

namespace taskloom {
namespace {

template <class Acc>
__global__ void __launch_bounds__(cuda_threads)
    masked_update_kernel(DeviceValues target, DeviceMask mask, DeviceValues delta, Acc scale, int64_t numel, DeviceValues out) {
  const int64_t groups = (numel + vector_entries - 1) / vector_entries;
  const bool in_place = out.data == target.data;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const int64_t begin = group * vector_entries;
    const uint32_t chosen = load_mask(mask, group, numel);
    if (in_place && chosen == 0) continue;
    Acc values[vector_entries], deltas[vector_entries];
    load_eight(target, begin, numel, values);
    load_eight(delta, begin, numel, deltas);
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) values[i] += scale * deltas[i];
    store_chosen(out, target, begin, numel, chosen, values);
  }
}

void update(const Tensor& target, const Tensor& mask, const Tensor& delta, double scale, const Tensor& out) {
  const Tensor flat_mask = beside(mask, out), flat_delta = beside(delta, out);
  const DeviceValues values = device_values(target, "target"), deltas = device_values(flat_delta, "delta");
  const DeviceValues outputs = device_values(out, "target");
  const int64_t numel = target.numel(), groups = (numel + vector_entries - 1) / vector_entries;
  if (values.dtype == DType::f64 || deltas.dtype == DType::f64) {
    launch_striding(out, groups, masked_update_kernel<double>, values, device_mask(flat_mask), deltas, scale, numel, outputs);
  } else {
    launch_striding(out, groups, masked_update_kernel<float>, values, device_mask(flat_mask), deltas, static_cast<float>(scale), numel,
                    outputs);
  }
}

Tensor masked_update_cuda(const Tensor& target, const Tensor& mask, const Tensor& delta, double scale) {
  check_masked_update(target, mask, delta);
  Tensor out = torch::stable::new_empty(target, target.sizes(), target.scalar_type());
  update(torch::stable::contiguous(target), mask, delta, scale, out);
  return out;
}

void masked_update_inplace_cuda(Tensor target, const Tensor& mask, const Tensor& delta, double scale) {
  check_masked_update(target, mask, delta);
  const Tensor flat = torch::stable::contiguous(target);
  update(flat, mask, delta, scale, flat);
  if (!target.is_contiguous()) torch::stable::copy_(target, flat);
}

}  // namespace

TASKLOOM_CUDA_OPS(m) {
  m.impl("masked_update", TORCH_BOX(&masked_update_cuda));
  m.impl("masked_update_", TORCH_BOX(&masked_update_inplace_cuda));
}

}  // namespace taskloom
