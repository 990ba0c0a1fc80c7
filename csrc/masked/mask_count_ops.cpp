// mask_count: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "masked/mask_checks.h"
#include "masked/mask_count.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

std::tuple<Tensor, Tensor> mask_count_cpu(std::vector<Tensor> packed, int64_t numel, int64_t k) {
  check_mask_count(packed, numel, k);
  const auto tasks = static_cast<int64_t>(packed.size());
  std::vector<Tensor> flat;
  std::vector<const uint8_t*> masks;
  for (const Tensor& one : packed) {
    flat.push_back(contiguous_of(one));
    masks.push_back(static_cast<const uint8_t*>(flat.back().const_data_ptr()));
  }
  Tensor selected = empty_cpu({(numel + 7) / 8}, ScalarType::Byte);
  Tensor histogram = empty_cpu({tasks + 1}, ScalarType::Long);
  auto* to = static_cast<uint8_t*>(selected.mutable_data_ptr());
  auto* counts = static_cast<int64_t*>(histogram.mutable_data_ptr());
  const int64_t chunks = chunk_count(numel, chunk);
  std::vector<int64_t> parts(static_cast<size_t>(chunks * (tasks + 1)));
  torch_parallel()(chunks, [&](int64_t index) {
    const int64_t begin = index * chunk;
    mask_count_loops().count(masks.data(), tasks, k, begin, std::min(chunk, numel - begin), to, parts.data() + index * (tasks + 1));
  });
  for (int64_t c = 0; c <= tasks; ++c) {
    counts[c] = 0;
    for (int64_t index = 0; index < chunks; ++index) counts[c] += parts[static_cast<size_t>(index * (tasks + 1) + c)];
  }
  return {selected, histogram};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("mask_count", TORCH_BOX(&mask_count_cpu)); }

}  // namespace taskloom
