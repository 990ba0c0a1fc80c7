// Thresholds by brackets: a sample says between which two magnitudes each lies, and one pass counts around them and keeps what lies
// between. A bracket that misses, or keeps more than there is room for, finds nothing; the histograms of magnitude_threshold always do.
#pragma once

#include <optional>
#include <vector>

#include "masked/magnitude_threshold.h"

namespace taskloom {

struct WantedRank {
  int task;      // index of its delta
  int64_t rank;  // 0 < rank < numel
};

// The thresholds of ranks of deltas of one tensor, where `room` bytes were enough to find them; those of one task stand together.
std::vector<std::optional<Threshold>> bracketed_thresholds(const Delta* deltas, int64_t numel, const std::vector<WantedRank>& wanted,
                                                           bool wide, int64_t room, const ParallelFor& parallel);

// The most bytes that this keeps for so many ranks, were there all the room.
int64_t most_bracket_room(int64_t numel, int64_t wanted, bool wide);

}  // namespace taskloom
