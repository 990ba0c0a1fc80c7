// masked_update, masked_update_: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "masked/mask_checks.h"
#include "masked/masked_update.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

// `target` is contiguous; `out` is contiguous and may be target.
void update(const Tensor& target, const Tensor& mask, const Tensor& delta, double scale, const Tensor& out) {
  const int64_t numel = target.numel();
  const Tensor flat_mask = beside(mask, out), flat_delta = beside(delta, out);
  const MaskedUpdate view{elements_of(target, "target"),
                          elements_of(flat_delta, "delta"),
                          static_cast<const uint8_t*>(flat_mask.const_data_ptr()),
                          mask.scalar_type() == ScalarType::Byte,
                          scale,
                          out.mutable_data_ptr()};
  const bool wide = view.target.dtype == DType::f64 || view.delta.dtype == DType::f64;
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    masked_update_loops().update(wide, view, begin, std::min(chunk, numel - begin));
  });
}

Tensor masked_update_cpu(const Tensor& target, const Tensor& mask, const Tensor& delta, double scale) {
  check_masked_update(target, mask, delta);
  Tensor out = empty_of_shape(target, target.scalar_type());
  update(contiguous_of(target), mask, delta, scale, out);
  return out;
}

void masked_update_inplace_cpu(Tensor target, const Tensor& mask, const Tensor& delta, double scale) {
  check_masked_update(target, mask, delta);
  const Tensor flat = contiguous_of(target);
  update(flat, mask, delta, scale, flat);
  if (!target.is_contiguous()) torch::stable::copy_(target, flat);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("masked_update", TORCH_BOX(&masked_update_cpu));
  m.impl("masked_update_", TORCH_BOX(&masked_update_inplace_cpu));
}

}  // namespace taskloom
