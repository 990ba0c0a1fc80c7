// masked_compress, masked_restore: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "masked/masked_compress.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;

int64_t element_bytes(const Tensor& tensor, const char* name) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(size == 1 || size == 2 || size == 4 || size == 8, name, ": expected elements of 1, 2, 4 or 8 bytes, got ", size);
  return size;
}

// How many entries are set before each chunk, and in the end in all.
std::vector<int64_t> places_of(const uint8_t* packed, int64_t numel) {
  const int64_t chunks = chunk_count(numel, chunk);
  std::vector<int64_t> places(static_cast<size_t>(chunks + 1));
  torch_parallel()(chunks, [&](int64_t index) {
    const int64_t begin = index * chunk;
    places[static_cast<size_t>(index + 1)] = masked_compress_loops().count(packed, begin, std::min(chunk, numel - begin));
  });
  for (size_t index = 1; index < places.size(); ++index) places[index] += places[index - 1];
  return places;
}

Tensor masked_compress_cpu(const Tensor& values, const Tensor& packed) {
  const int64_t numel = values.numel(), size = element_bytes(values, "values");
  check_packed(packed, numel, "packed");
  const Tensor flat = contiguous_of(values), bits = contiguous_of(packed);
  const auto* mask = static_cast<const uint8_t*>(bits.const_data_ptr());
  const void* from = flat.const_data_ptr();
  const std::vector<int64_t> places = places_of(mask, numel);
  Tensor out = empty_cpu({places.back()}, values.scalar_type());
  void* to = out.mutable_data_ptr();
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk;
    masked_compress_loops().compress(size, from, mask, begin, std::min(chunk, numel - begin), places[static_cast<size_t>(index)], to);
  });
  return out;
}

Tensor masked_restore_cpu(const Tensor& compressed, const Tensor& packed, const Tensor& base) {
  const int64_t numel = base.numel(), size = element_bytes(base, "base");
  STD_TORCH_CHECK(compressed.scalar_type() == base.scalar_type(), "compressed: expected the dtype of base");
  check_packed(packed, numel, "packed");
  const Tensor flat = contiguous_of(base), bits = contiguous_of(packed);
  const Tensor stored = contiguous_of(compressed);
  const auto* mask = static_cast<const uint8_t*>(bits.const_data_ptr());
  const std::vector<int64_t> places = places_of(mask, numel);
  STD_TORCH_CHECK(compressed.numel() == places.back(), "compressed: expected ", places.back(), " elements, one for each set entry, got ",
                  compressed.numel());
  Tensor out = empty_of_shape(base, base.scalar_type());
  const void *from = stored.const_data_ptr(), *under = flat.const_data_ptr();
  void* to = out.mutable_data_ptr();
  torch_parallel()(chunk_count(numel, chunk), [&](int64_t index) {
    const int64_t begin = index * chunk, n = std::min(chunk, numel - begin);
    masked_compress_loops().restore(size, from, mask, under, begin, n, places[static_cast<size_t>(index)], to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("masked_compress", TORCH_BOX(&masked_compress_cpu));
  m.impl("masked_restore", TORCH_BOX(&masked_restore_cpu));
}

}  // namespace taskloom
