// Checks and conversions that the stable-ABI wrappers share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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

inline Tensor empty_of_shape(const Tensor& like, ScalarType dtype) { return torch::stable::empty(like.sizes(), dtype); }

// Whether two contiguous tensors share a byte.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  const auto a_begin = reinterpret_cast<uintptr_t>(a.const_data_ptr()), b_begin = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  const auto a_end = a_begin + static_cast<uintptr_t>(a.numel()) * a.element_size();
  const auto b_end = b_begin + static_cast<uintptr_t>(b.numel()) * b.element_size();
  return a_begin < b_end && b_begin < a_end;
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
