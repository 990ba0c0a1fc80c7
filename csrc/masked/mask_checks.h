// What the wrappers of ops on masks check and prepare on every device.
#pragma once

#include <vector>

#include "common/checks.h"
#include "masked/mask_count.h"

namespace taskloom {

inline void check_mask(const Tensor& mask, int64_t numel) {
  if (mask.scalar_type() == ScalarType::Byte) {
    check_packed(mask, numel, "mask");
  } else {
    check_dtype(mask, ScalarType::Bool, "mask", "bool or packed uint8");
    check_numel(mask, numel, "mask", "target");
  }
}

inline void check_masked_update(const Tensor& target, const Tensor& mask, const Tensor& delta) {
  dtype_of(target, "target");
  dtype_of(delta, "delta");
  check_numel(delta, target.numel(), "delta", "target");
  check_mask(mask, target.numel());
}

// A contiguous input that a kernel may read while it writes `out`: a copy, unless it is elsewhere or exactly `out`.
inline Tensor beside(const Tensor& input, const Tensor& out) {
  const Tensor flat = contiguous_of(input);
  const bool same = flat.const_data_ptr() == out.const_data_ptr() && flat.scalar_type() == out.scalar_type();
  return share_memory(flat, out) && !same ? torch::stable::clone(flat) : flat;
}

inline void check_masked_switch(const Tensor& target, const Tensor& base, const Tensor& delta, const Tensor& old_packed,
                                const Tensor& new_packed) {
  const int64_t numel = target.numel();
  check_numel(base, numel, "base", "target");
  check_numel(delta, numel, "delta", "target");
  check_packed(old_packed, numel, "old_packed");
  check_packed(new_packed, numel, "new_packed");
  for (const Tensor* other : {&base, &delta, &old_packed, &new_packed}) {
    STD_TORCH_CHECK(!share_memory(target, *other), "target: must not share memory with base, delta or a mask");
  }
}

inline void check_mask_count(const std::vector<Tensor>& packed, int64_t numel, int64_t k) {
  const auto tasks = static_cast<int64_t>(packed.size());
  STD_TORCH_CHECK(tasks >= 1 && tasks < mask_count_limit, "packed: expected 1 to ", mask_count_limit - 1, " masks, got ", tasks);
  STD_TORCH_CHECK(numel >= 0, "numel: must not be negative, got ", numel);
  STD_TORCH_CHECK(k >= 0, "k: must not be negative, got ", k);
  for (const Tensor& one : packed) check_packed(one, numel, "packed");
}

}  // namespace taskloom
