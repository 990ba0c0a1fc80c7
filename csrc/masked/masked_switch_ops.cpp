// masked_switch_: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "masked/mask_checks.h"
#include "masked/masked_switch.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

void masked_switch_cpu(Tensor target, const Tensor& base, const Tensor& delta, const Tensor& old_packed, const Tensor& new_packed) {
  const int64_t numel = target.numel();
  check_masked_switch(target, base, delta, old_packed, new_packed);
  const Tensor flat = contiguous_of(target), flat_base = contiguous_of(base);
  const Tensor flat_delta = contiguous_of(delta);
  const Tensor old_mask = contiguous_of(old_packed), new_mask = contiguous_of(new_packed);
  const MaskedSwitch view{elements_of(flat_base, "base"),
                          elements_of(flat_delta, "delta"),
                          static_cast<const uint8_t*>(old_mask.const_data_ptr()),
                          static_cast<const uint8_t*>(new_mask.const_data_ptr()),
                          flat.mutable_data_ptr(),
                          dtype_of(flat, "target")};
  const bool wide = view.target_dtype == DType::f64 || view.base.dtype == DType::f64 || view.delta.dtype == DType::f64;
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    masked_switch_loops().change(wide, view, begin, std::min(chunk, numel - begin));
  });
  if (!target.is_contiguous()) torch::stable::copy_(target, flat);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("masked_switch_", TORCH_BOX(&masked_switch_cpu)); }

}  // namespace taskloom
