// Indices out of tensors, checked.
#pragma once

#include "common/checks.h"
#include "gating/indices.h"

namespace taskloom {

inline bool is_wide_index(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, ": expected an int32 or int64 tensor, got ScalarType ",
                  static_cast<int>(type));
  return type == ScalarType::Long;
}

// The indices of a contiguous tensor, which must outlive them.
inline Indices indices_of(const Tensor& contiguous, const char* name) {
  return {contiguous.const_data_ptr(), is_wide_index(contiguous, name)};
}

// Raises unless n indices are least .. count - 1; `of` says what that is.
inline void check_inside(const Indices& indices, int64_t n, int64_t least, int64_t count, const char* name, const char* of) {
  const int64_t place = find_outside(indices, n, least, count);
  if (place < 0) return;
  STD_TORCH_CHECK(false, name, ": expected ", least, " to ", count - 1, ", ", of, ", got ", index_at(indices, place), " at entry ", place);
}

}  // namespace taskloom
