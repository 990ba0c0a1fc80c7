// Which of many tensors an item of work belongs to: work over a list of tensors is cut into pieces of one size, numbered through all of
// them, so that many small tensors and few huge ones spread over the device alike.
#pragma once

#include <cstdint>

namespace taskloom {

// The row of `rows` (at least one) to which item `item` belongs; row.*first is the number of the row's first item, and rows without items
// may lie between others.
template <auto first, class Row>
__device__ inline int64_t row_of(const Row* rows, int64_t count, int64_t item) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (rows[middle].*first <= item ? low : high) = middle;
  }
  return low;
}

}  // namespace taskloom
