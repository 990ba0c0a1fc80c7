// Tensors of int32 or int64 indices: entries, and the search for one that is out of range. Torch-free.
#pragma once

#include <cstdint>

#include "common/unaligned.h"

namespace taskloom {

struct Indices {
  const void* data = nullptr;
  bool wide = false;  // int64
};

namespace {

inline int64_t index_at(const Indices& indices, int64_t place) {
  return indices.wide ? load_at<int64_t>(indices.data, place) : load_at<int32_t>(indices.data, place);
}

template <class Index>
inline bool all_inside(const void* data, int64_t n, int64_t least, int64_t count) {
  const uint64_t size = static_cast<uint64_t>(count - least);
  bool outside = false;
  for (int64_t i = 0; i < n; ++i) outside |= static_cast<uint64_t>(static_cast<int64_t>(load_at<Index>(data, i)) - least) >= size;
  return !outside;
}

// The place of the first of n indices that is not least .. count - 1; -1 where there is none.
inline int64_t find_outside(const Indices& indices, int64_t n, int64_t least, int64_t count) {
  if (indices.wide ? all_inside<int64_t>(indices.data, n, least, count) : all_inside<int32_t>(indices.data, n, least, count)) return -1;
  int64_t place = 0;
  while (index_at(indices, place) >= least && index_at(indices, place) < count) ++place;
  return place;
}

// An index that was found to be in 0 .. count - 1 before, read once more: one that another thread has changed is 0 now.
inline int64_t row_at(const Indices& indices, int64_t place, int64_t count) {
  const int64_t row = index_at(indices, place);
  return row >= 0 && row < count ? row : 0;
}

}  // namespace
}  // namespace taskloom
