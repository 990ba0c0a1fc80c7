// Checks and conversions that the stable-ABI wrappers share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace taskloom {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      return DType::f64;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, ": expected a float32, float16, bfloat16 or float64 tensor, got ScalarType ",
                  static_cast<int>(tensor.scalar_type()));
  return DType::f32;
}

inline void check_dtype(const Tensor& tensor, ScalarType expected, const char* name, const char* type) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, ": expected a ", type, " tensor, got ScalarType ",
                  static_cast<int>(tensor.scalar_type()));
}

// The elements of a contiguous tensor, which must outlive them.
inline Elements elements_of(const Tensor& contiguous, const char* name) {
  return {contiguous.const_data_ptr(), dtype_of(contiguous, name)};
}

inline void check_numel(const Tensor& tensor, int64_t expected, const char* name, const char* of) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, ": expected ", expected, " entries as in ", of, ", got ", tensor.numel());
}

inline void check_packed(const Tensor& packed, int64_t numel, const char* name) {
  check_dtype(packed, ScalarType::Byte, name, "uint8");
  STD_TORCH_CHECK(packed.numel() == (numel + 7) / 8, name, ": expected ", (numel + 7) / 8, " bytes for ", numel, " entries, got ",
                  packed.numel());
}

// Entries of a mask of `shape`, for which `packed` has to have the bytes.
inline int64_t check_packed_shape(const Tensor& packed, const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "shape: sizes must not be negative, got ", size);
    STD_TORCH_CHECK(!__builtin_mul_overflow(numel, size, &numel), "shape: more entries than 64 bits count");
  }
  check_packed(packed, numel, "packed");
  return numel;
}

// The tensor itself where it is contiguous, else a contiguous copy: a call through torch's dispatcher takes as long as a small op.
inline Tensor contiguous_of(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// A new contiguous CPU tensor, past the dispatcher too.
inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t usual = 8;
  std::array<int64_t, usual> few;
  std::vector<int64_t> many(sizes.size() > usual ? sizes.size() : 0);
  int64_t* const strides = many.empty() ? few.data() : many.data();
  int64_t stride = 1;
  for (size_t place = sizes.size(); place-- > 0;) {
    strides[place] = stride;
    stride *= std::max<int64_t>(sizes[place], 1);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_of_shape(const Tensor& like, ScalarType dtype) { return empty_cpu(like.sizes(), dtype); }

// Bytes from the first element of a tensor to the end of its last; nothing where it has none. Strides are never negative.
struct Extent {
  uintptr_t begin, end;
};

inline Extent extent_of(const Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const size_t element = tensor.element_size();
  if (tensor.is_contiguous()) return {begin, begin + static_cast<uintptr_t>(tensor.numel()) * element};
  uintptr_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += static_cast<uintptr_t>((tensor.size(dim) - 1) * tensor.stride(dim));
  return {begin, begin + (tensor.numel() == 0 ? 0 : (last + 1) * element)};
}

// Whether memory of one tensor lies between the first and the last element of the other.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  const Extent first = extent_of(a), second = extent_of(b);
  return first.begin < second.end && second.begin < first.end && first.begin != first.end && second.begin != second.end;
}

inline void run_on_torch_threads(void*, int64_t count, ParallelFor::Body body, void* argument) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) body(index, argument);
  });
}

// torch's own threads, one index per task.
inline ParallelFor torch_parallel() {
  // A level that cannot be had raises here: what is thrown inside torch's parallel_for loses its message.
  cpu_level();
  return {run_on_torch_threads, nullptr};
}

}  // namespace taskloom
