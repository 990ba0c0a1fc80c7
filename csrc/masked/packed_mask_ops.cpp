// pack_mask, unpack_mask: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "masked/packed_mask.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

Tensor pack_mask_cpu(const Tensor& mask) {
  check_dtype(mask, ScalarType::Bool, "mask", "bool");
  const Tensor flat = contiguous_of(mask);
  const int64_t numel = flat.numel();
  Tensor packed = empty_cpu({(numel + 7) / 8}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(flat.const_data_ptr());
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    packed_mask_loops().pack(from + begin, std::min(chunk, numel - begin), to + begin / 8);
  });
  return packed;
}

Tensor unpack_mask_cpu(const Tensor& packed, std::vector<int64_t> shape) {
  const int64_t numel = check_packed_shape(packed, shape);
  const Tensor flat = contiguous_of(packed);
  Tensor mask = empty_cpu(shape, ScalarType::Bool);
  const auto* from = static_cast<const uint8_t*>(flat.const_data_ptr());
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    packed_mask_loops().unpack(from + begin / 8, std::min(chunk, numel - begin), to + begin);
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask_cpu));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask_cpu));
}

}  // namespace taskloom
