// Which groups of neighbouring experts a row keeps. For NAME_loops.cpp files. Torch-free, internal linkage.
#pragma once

#include "gating/gate_rows.h"

namespace taskloom {
namespace {

// The largest and the second largest entry of each lane.
template <class Acc>
struct TwoBest {
  Lanes<Acc> first, second;
};

template <class V>
inline __attribute__((always_inline)) void join_two_best(V& first, V& second, const V& other, const V& other_second) {
  const V lower = first > other ? other : first;
  const V best = first > other ? first : other;
  const V seconds = second > other_second ? second : other_second;
  first = best;
  second = lower > seconds ? lower : seconds;
}

// The two best of all lanes, the vector's halves onto each other again and again.
template <class Acc>
inline __attribute__((always_inline)) void two_best_of_lanes(TwoBest<Acc>& best, Acc& first, Acc& second) {
  using Native = typename Lanes<Acc>::Native;
  typedef typename Words<Acc>::Int Places __attribute__((vector_size(native_bytes)));
  for (int width = Lanes<Acc>::parts / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      join_two_best(best.first.part[i], best.second.part[i], best.first.part[i + width], best.second.part[i + width]);
  constexpr int count = native_bytes / static_cast<int>(sizeof(Acc));
  Native a = best.first.part[0], b = best.second.part[0];
#pragma GCC unroll 4
  for (int width = count / 2; width > 0; width /= 2) {
    Places from;
    for (int lane = 0; lane < count; ++lane) from[lane] = lane ^ width;
    join_two_best(a, b, __builtin_shuffle(a, from), __builtin_shuffle(b, from));
  }
  first = a[0];
  second = b[0];
}

// What each group is judged by: its best entry, or the sum of its two best. -inf fills up to whole steps.
template <class Acc>
inline void judge_groups(const Acc* x, int64_t groups, int64_t size, bool by_two_best, Acc* judged) {
  const Lanes<Acc> lowest = every_lane(lowest_value<Acc>());
  for (int64_t group = 0; group < groups; ++group) {
    TwoBest<Acc> best{lowest, lowest};
    over_lanes(size, [&](int64_t place, auto count) __attribute__((always_inline)) {
      const Lanes<Acc> values = load_some(x + group * size + place, count, lowest_value<Acc>());
      for (int i = 0; i < Lanes<Acc>::parts; ++i) join_two_best(best.first.part[i], best.second.part[i], values.part[i], lowest.part[i]);
    });
    Acc first, second;
    two_best_of_lanes(best, first, second);
    judged[group] = by_two_best ? first + second : first;
  }
}

// The numbers of the `wanted` best groups, rising; equal ones by number. False where one is judged by NaN.
template <class Acc>
inline bool keep_groups(const Acc* judged, int64_t groups, int64_t wanted, int32_t* kept) {
  bool numbers = true;
  for (int64_t group = 0; group < groups; ++group) numbers = numbers && judged[group] == judged[group];
  int64_t count = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const Acc own = judged[group];
    int before = 0;
    for (int64_t other = 0; other < group; ++other) before += judged[other] >= own ? 1 : 0;
    for (int64_t other = group + 1; other < groups; ++other) before += judged[other] > own ? 1 : 0;
    if (before < wanted && count < wanted) kept[count++] = static_cast<int32_t>(group);
  }
  return numbers;
}

}  // namespace
}  // namespace taskloom
