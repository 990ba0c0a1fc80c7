#include "routed/plan_windows.h"

#include <algorithm>
#include <numeric>

namespace taskloom {

WindowPlan plan_windows(const int64_t* keys, int64_t samples, int64_t columns) {
  WindowPlan plan;
  plan.order.resize(samples);
  std::iota(plan.order.begin(), plan.order.end(), int64_t{0});
  const auto compared = [&](int64_t first, int64_t second) {
    return std::lexicographical_compare_three_way(keys + first * columns, keys + (first + 1) * columns, keys + second * columns,
                                                  keys + (second + 1) * columns);
  };
  std::sort(plan.order.begin(), plan.order.end(), [&](int64_t first, int64_t second) {
    const auto found = compared(first, second);
    return found < 0 || (found == 0 && first < second);
  });
  for (int64_t place = 0; place < samples; ++place) {
    if (place == 0 || compared(plan.order[place - 1], plan.order[place]) != 0) plan.bounds.push_back(place);
  }
  plan.bounds.push_back(samples);
  return plan;
}

}  // namespace taskloom
