// Rows as a block of sparse_merge takes them: whole vectors of eight entries that meet the row, wherever it begins.
#pragma once

#include "masked/sparse_merge_stages.h"

namespace taskloom {

struct Row {
  int64_t begin, end;
  bool starts_bytes;  // whether no row before this one, of the same bundle, has written to the byte of the first entry

  __device__ int64_t first_vector() const { return begin / vector_entries * vector_entries; }
  // Bits of a vector's entries that are in the row.
  __device__ uint32_t inside(int64_t vector) const { return entries_before(vector, end) & ~entries_before(vector, begin); }

  // Writes a vector's selected entries; rows of a bundle go one after the other.
  __device__ void store_bits(const DeviceMerge& merge, int t, int64_t vector, uint32_t kept) const {
    uint8_t* const byte = merge.tasks[t].mask + (vector - merge.first) / vector_entries;
    const uint32_t before = vector < begin && !starts_bytes ? *byte : 0u;
    *byte = static_cast<uint8_t>(before | (kept & inside(vector)));
  }
};

// The rows of a merge's entries begin .. end.
struct RowBundles {
  int64_t begin, end, length, rows, count;

  __host__ __device__ RowBundles(const DeviceMerge& merge, int64_t row_length)
      : begin(merge.begin), end(merge.end), length(row_length), rows(rows_of_bundle(row_length)) {
    const int64_t entries = rows * length;
    count = (end - begin + entries - 1) / entries;
  }

  template <class Body>
  __device__ void for_each_row(int64_t bundle, Body body) const {
    const int64_t first = begin + bundle * rows * length;
    for (int64_t row = 0; row < rows && first + row * length < end; ++row) {
      body(Row{first + row * length, first + (row + 1) * length, row == 0});
    }
  }
};

template <class Acc>
__device__ inline void load_row_delta(const DeviceMerge& merge, int t, int64_t begin, Acc (&delta)[vector_entries]) {
  Acc base[vector_entries];
  load_base(merge, begin, base);
  load_delta(merge, merge.tasks[t], begin, base, delta);
}

}  // namespace taskloom
