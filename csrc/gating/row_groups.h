// Which groups of neighbouring experts a row keeps. For NAME_loops.cpp files. Torch-free, internal linkage.
#pragma once

#include "gating/row_choice.h"

namespace taskloom {
namespace {

template <class V>
inline __attribute__((always_inline)) V larger_of(const V& a, const V& b) {
  return a > b ? a : b;
}

template <class V>
inline __attribute__((always_inline)) V smaller_of(const V& a, const V& b) {
  return a < b ? a : b;
}

// The places of a vector with halves of `2 * width` entries changed for each other.
template <class Acc, int width>
struct Flipped {
  using Int = typename Words<Acc>::Int;
  static constexpr int count = native_bytes / static_cast<int>(sizeof(Acc));
  typedef Int Places __attribute__((vector_size(native_bytes)));

  struct Table {
    alignas(native_bytes) Int place[count];
  };

  static constexpr Table make() {
    Table made{};
    for (int lane = 0; lane < count; ++lane) made.place[lane] = lane ^ width;
    return made;
  }

  static constexpr Table table = make();

  template <class V>
  static __attribute__((always_inline)) V of(const V& values) {
    Places from;
    std::memcpy(&from, table.place, sizeof from);
    return __builtin_shuffle(values, from);
  }
};

// Joins the largest (and, with `two`, second largest) entries of lanes `width` apart, and so on down to neighbours.
template <class Acc, bool two, int width, class V>
inline __attribute__((always_inline)) void join_lanes(V& first, V& second) {
  if constexpr (width > 0) {
    const V other = Flipped<Acc, width>::of(first);
    if constexpr (two) second = larger_of(smaller_of(first, other), larger_of(second, Flipped<Acc, width>::of(second)));
    first = larger_of(first, other);
    join_lanes<Acc, two, width / 2>(first, second);
  }
}

// What each group is judged by: its best entry, or with `two` the sum of its two best.
template <bool two, class Acc>
inline void judge_groups(const Acc* x, int64_t groups, int64_t size, Acc* judged) {
  constexpr int parts = Lanes<Acc>::parts;
  for (int64_t group = 0; group < groups; ++group) {
    Lanes<Acc> first = every_lane(lowest_value<Acc>()), second = first;
    over_lanes(size, [&](int64_t place, auto count) __attribute__((always_inline)) {
      const Lanes<Acc> values = load_part(x + group * size + place, count, lowest_value<Acc>());
      for (int i = 0; i < parts; ++i) {
        if constexpr (two) second.part[i] = larger_of(smaller_of(first.part[i], values.part[i]), second.part[i]);
        first.part[i] = larger_of(first.part[i], values.part[i]);
      }
    });
    auto best = first.part[0], next = second.part[0];
    for (int i = 1; i < parts; ++i) {
      if constexpr (two) next = larger_of(smaller_of(best, first.part[i]), larger_of(next, second.part[i]));
      best = larger_of(best, first.part[i]);
    }
    join_lanes<Acc, two, Flipped<Acc, 1>::count / 2>(best, next);
    judged[group] = two ? best[0] + next[0] : best[0];
  }
}

// How many groups come before each of up to sixteen.
template <class Acc>
inline void rank_few_groups(const Acc* judged, int64_t groups, Acc* before) {
  static constexpr Acc later[2 * lanes] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const Lanes<Acc> own = load_some(judged, groups, lowest_value<Acc>());
  Lanes<Acc> rank = every_lane(Acc{0});
  const Lanes<Acc> zero = rank, one = every_lane(Acc{1});
  for (int64_t group = 0; group < groups; ++group) {
    const Lanes<Acc> each = every_lane(judged[group]), after = load_whole(later + lanes - 1 - group);
    for (int i = 0; i < Lanes<Acc>::parts; ++i) {
      const auto equal = each.part[i] == own.part[i] ? after.part[i] : zero.part[i];
      rank.part[i] += each.part[i] > own.part[i] ? one.part[i] : equal;
    }
  }
  store_whole(before, rank);
}

// The numbers of the `wanted` best groups, rising; equal ones by number. False where one is judged by NaN.
template <class Acc>
inline bool keep_groups(const Acc* judged, int64_t groups, int64_t wanted, int32_t* kept) {
  int64_t wrong = 0, count = 0;
  for (int64_t group = 0; group < groups; ++group) wrong += judged[group] == judged[group] ? 0 : 1;
  if (wrong != 0) return false;
  if (groups <= lanes) {
    Acc before[lanes];
    rank_few_groups(judged, groups, before);
    for (int64_t group = 0; group < groups; ++group) {
      kept[count] = static_cast<int32_t>(group);
      count += before[group] < static_cast<Acc>(wanted) ? 1 : 0;
    }
    return true;
  }
  for (int64_t group = 0; group < groups; ++group) {
    const Acc own = judged[group];
    int64_t before = 0;
    for (int64_t other = 0; other < group; ++other) before += judged[other] >= own ? 1 : 0;
    for (int64_t other = group + 1; other < groups; ++other) before += judged[other] > own ? 1 : 0;
    kept[count] = static_cast<int32_t>(group);
    count += before < wanted ? 1 : 0;
  }
  return true;
}

}  // namespace
}  // namespace taskloom
