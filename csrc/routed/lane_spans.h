// Runs of entries as lanes, the last of them in part; and the sums over them. For NAME_loops.cpp files. Torch-free, internal linkage.
#pragma once

#include <type_traits>

#include "common/convert.h"
#include "lowrank/lanes.h"

namespace taskloom {
namespace {

template <class Acc>
inline constexpr DType dtype_of_arithmetic = sizeof(Acc) == 8 ? DType::f64 : DType::f32;

// Calls body(place, count) for the entries 0 .. n: count is `lanes`, or less at the end.
template <class F>
inline __attribute__((always_inline)) void over_lanes(int64_t n, const F& body) {
  int64_t place = 0;
  for (; place + lanes <= n; place += lanes) body(place, std::integral_constant<int64_t, lanes>{});
  if (place < n) body(place, n - place);
}

template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> load_some(const Acc* from, int64_t count, Acc filler) {
  if (count == lanes) return load_lanes(from);
  Acc all[lanes];
  for (int64_t lane = 0; lane < lanes; ++lane) all[lane] = lane < count ? load_at<Acc>(from, lane) : filler;
  return load_lanes(all);
}

template <class Acc>
inline __attribute__((always_inline)) void store_some(Acc* to, int64_t count, const Lanes<Acc>& values) {
  if (count == lanes) {
    store_lanes(to, values);
    return;
  }
  Acc all[lanes];
  store_lanes(all, values);
  for (int64_t lane = 0; lane < count; ++lane) store_at(to, lane, all[lane]);
}

// Elements offset .. offset + n: where they lie if they are of the dtype of the arithmetic, else converted into `scratch`.
template <class Acc>
inline const Acc* read_run(const Elements& from, int64_t offset, int64_t n, Acc* scratch) {
  if (from.dtype == dtype_of_arithmetic<Acc>) return static_cast<const Acc*>(from.data) + offset;
  load_block(from.dtype, from.data, offset, n, scratch);
  return scratch;
}

// Where to put what becomes elements offset .. of a tensor; write_run puts it there if that is not the tensor itself.
template <class Acc>
inline Acc* target_run(DType dtype, void* data, int64_t offset, Acc* scratch) {
  return dtype == dtype_of_arithmetic<Acc> ? static_cast<Acc*>(data) + offset : scratch;
}

template <class Acc>
inline void write_run(DType dtype, void* data, int64_t offset, int64_t n, const Acc* values) {
  if (dtype != dtype_of_arithmetic<Acc>) store_block(dtype, values, n, data, offset);
}

template <class Acc>
inline void fill_run(Acc* to, int64_t n, Acc value) {
  const Lanes<Acc> all = every_lane(value);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) { store_some(to + place, count, all); });
}

template <class Acc>
inline Acc sum_of_run(const Acc* from, int64_t n) {
  Lanes<Acc> sum = every_lane(Acc{0});
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) { sum = sum + load_some(from + place, count, Acc{0}); });
  return sum_of_lanes(sum);
}

// The sum of squares about `center`.
template <class Acc>
inline Acc squares_of_run(const Acc* from, int64_t n, Acc center) {
  Lanes<Acc> sum = every_lane(Acc{0});
  const Lanes<Acc> middle = every_lane(center);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> apart = load_some(from + place, count, center) - middle;
    sum = sum + apart * apart;
  });
  return sum_of_lanes(sum);
}

// 1 / sqrt(variance + eps), rounded as every level rounds it.
template <class Acc>
inline Acc inverse_deviation(Acc variance, double eps) {
  Acc root[lanes];
  store_lanes(root, square_root(every_lane(variance + static_cast<Acc>(eps))));
  return Acc{1} / root[0];
}

}  // namespace
}  // namespace taskloom
