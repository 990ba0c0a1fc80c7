// The chunks in which magnitude thresholds are counted, and how a tie is found in them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/thread_scratch.h"
#include "masked/magnitude_threshold.h"

namespace taskloom {

constexpr int64_t threshold_chunk = 1 << 17;

struct ChunkRange {
  int64_t begin, length;
};

inline ChunkRange chunk_range(int64_t index, int64_t numel) {
  const int64_t begin = index * threshold_chunk;
  return {begin, std::min(threshold_chunk, numel - begin)};
}

// tie_end for the `kept` lowest indices that equal `bits`, where chunk_equal(c) of them lie in chunk c. Values that somebody changes after
// they were counted (a mapped file that is cut short reads as zeros) may hold fewer: every search ends with its range.
template <class Count>
int64_t locate_tie(bool wide, const Delta& delta, int64_t numel, int64_t bits, int64_t kept, const Count& chunk_equal) {
  if (kept == 0) return 0;
  const int64_t last = chunk_count(numel, threshold_chunk) - 1;
  int64_t index = 0;
  for (int64_t here = chunk_equal(index); kept > here && index < last; here = chunk_equal(index)) {
    kept -= here;
    ++index;
  }
  const ChunkRange range = chunk_range(index, numel);
  const ThreadScratch scratch(ScratchUse::magnitudes, range.length * (wide ? 8 : 4));
  threshold_loops().magnitudes(wide, delta, range.begin, range.length, scratch.data());
  auto search = [&](const auto* magnitudes) {
    for (int64_t i = 0; i < range.length; ++i) {
      if (static_cast<int64_t>(magnitudes[i]) == bits && --kept == 0) return range.begin + i + 1;
    }
    return range.begin + range.length;
  };
  return wide ? search(scratch.as<int64_t>()) : search(scratch.as<int32_t>());
}

}  // namespace taskloom
