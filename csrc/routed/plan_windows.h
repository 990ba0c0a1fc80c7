// Samples sorted and grouped by their windows of channels.
#pragma once

#include <cstdint>
#include <vector>

namespace taskloom {

struct WindowPlan {
  std::vector<int64_t> order;   // samples, those of one window next to each other
  std::vector<int64_t> bounds;  // where each group begins in the order, and the number of samples at the end
};

// keys: `columns` numbers for each of `samples` samples, row by row: the windows. Groups are sorted by their numbers, first column first;
// samples of a group by their index.
WindowPlan plan_windows(const int64_t* keys, int64_t samples, int64_t columns);

}  // namespace taskloom
