// Sums over runs of rows' entries by sixteen lanes, several at once so that one add need not wait for the one before. For NAME_loops.cpp
// files: internal linkage. Torch-free.
#pragma once

#include "routed/lane_spans.h"

namespace taskloom {
namespace {

// The sum over entries 0 .. n of what term(place, count) makes of a run of them; 0 lanes where there is no entry.
template <class Acc, class F>
inline __attribute__((always_inline)) Acc sum_of_terms(int64_t n, const F& term) {
  constexpr std::integral_constant<int64_t, lanes> whole;
  Lanes<Acc> sums[slots];
  for (auto& sum : sums) sum = every_lane(Acc{0});
  int64_t place = 0;
  for (; place + slots * lanes <= n; place += slots * lanes) {
    for (int slot = 0; slot < slots; ++slot) sums[slot] = sums[slot] + term(place + slot * lanes, whole);
  }
  for (; place + lanes <= n; place += lanes) sums[0] = sums[0] + term(place, whole);
  if (place < n) sums[0] = sums[0] + term(place, n - place);
  return sum_of_slots(sums);
}

// Calls body(place, count, strips) for the entries 0 .. n: `strips` runs of lanes from `place` on, each of `count` entries.
template <class F>
inline __attribute__((always_inline)) void over_strips(int64_t n, const F& body) {
  constexpr std::integral_constant<int64_t, lanes> whole;
  int64_t place = 0;
  for (; place + slots * lanes <= n; place += slots * lanes) body(place, whole, std::integral_constant<int, slots>{});
  for (; place + lanes <= n; place += lanes) body(place, whole, std::integral_constant<int, 1>{});
  if (place < n) body(place, n - place, std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace taskloom
