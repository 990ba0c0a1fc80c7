// Sizes around what the loops divide their work by.
#pragma once

#include <cstdint>
#include <vector>

namespace taskloom::sanitize {

// Empty, single, odd, and around vectors (16 to 64 entries) and blocks (512).
inline const std::vector<int64_t>& sizes() {
  static const std::vector<int64_t> values{0,  1,  2,  3,  7,   8,   9,   15,  16,  17,  31,   32,
                                           33, 63, 64, 65, 127, 129, 255, 511, 512, 513, 1000, 1025};
  return values;
}

// The same with the borders of a merge's chunk.
inline const std::vector<int64_t>& sizes_and_chunks() {
  static const std::vector<int64_t> values = [] {
    std::vector<int64_t> all = sizes();
    constexpr int64_t chunk = 1 << 17;
    for (const int64_t size : {chunk - 1, chunk, chunk + 1}) all.push_back(size);
    return all;
  }();
  return values;
}

// And with those of the tensors whose magnitudes are sorted whole, and of a mask's chunk.
inline const std::vector<int64_t>& sizes_and_borders() {
  static const std::vector<int64_t> values = [] {
    std::vector<int64_t> all = sizes_and_chunks();
    for (const int64_t border : {int64_t{1} << 16, int64_t{1} << 18}) {
      for (const int64_t size : {border - 1, border, border + 1}) all.push_back(size);
    }
    return all;
  }();
  return values;
}

}  // namespace taskloom::sanitize
