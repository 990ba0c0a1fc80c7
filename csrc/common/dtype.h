// Storage types of tensor elements, and the type that arithmetic on them uses. Torch-free.
#pragma once

#include <cstdint>

namespace taskloom {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

static inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 4;
    case DType::f64:
      return 8;
    default:
      return 2;
  }
}

// Contiguous elements of one storage type.
struct Elements {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

}  // namespace taskloom
