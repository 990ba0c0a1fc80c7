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

// Lanes at any address, by vectors: copies of the whole struct would go through the stack.
template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> load_whole(const Acc* from) {
  typedef Acc Anywhere __attribute__((vector_size(native_bytes), aligned(1), may_alias));
  Lanes<Acc> r;
  for (int i = 0; i < Lanes<Acc>::parts; ++i) r.part[i] = reinterpret_cast<const Anywhere*>(from)[i];
  return r;
}

template <class Acc>
inline __attribute__((always_inline)) void store_whole(Acc* to, const Lanes<Acc>& values) {
  typedef Acc Anywhere __attribute__((vector_size(native_bytes), aligned(1), may_alias));
  for (int i = 0; i < Lanes<Acc>::parts; ++i) reinterpret_cast<Anywhere*>(to)[i] = values.part[i];
}

template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> load_some(const Acc* from, int64_t count, Acc filler) {
  if (count == lanes) return load_whole(from);
  Acc all[lanes];
  for (int64_t lane = 0; lane < lanes; ++lane) all[lane] = lane < count ? load_at<Acc>(from, lane) : filler;
  return load_whole(all);
}

template <class Acc>
inline __attribute__((always_inline)) void store_some(Acc* to, int64_t count, const Lanes<Acc>& values) {
  if (count == lanes) {
    store_whole(to, values);
    return;
  }
  Acc all[lanes];
  store_whole(all, values);
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

// Which lanes of a block of channels are in the window: all, or those whose flag is above 0.
struct AllInside {};

template <class Acc>
struct SomeInside {
  Lanes<Acc> flag;
};

template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> select_inside(AllInside, const Lanes<Acc>& inside, const Lanes<Acc>&) {
  return inside;
}

template <class Acc>
inline __attribute__((always_inline)) Lanes<Acc> select_inside(const SomeInside<Acc>& which, const Lanes<Acc>& inside,
                                                               const Lanes<Acc>& outside) {
  return where_above(which.flag, every_lane(Acc{0}), inside, outside);
}

// A window of a row's channels in whole blocks of lanes, counted from the row's first channel, so that most loads lie as the row does.
struct WindowBlocks {
  int64_t start, stop, channels;
  int64_t first, last;  // the blocks that hold it: from `first` to the channels' end at most

  WindowBlocks(int64_t start, int64_t stop, int64_t channels)
      : start(start), stop(stop), channels(channels), first(start / lanes * lanes), last((stop + lanes - 1) / lanes * lanes) {
    if (last > channels) last = channels;
    if (start == stop) last = first;
  }
};

// Independent sums that a pass keeps, so that one add need not wait for the one before.
constexpr int slots = 4;

template <int slot>
using Slot = std::integral_constant<int, slot>;

// Calls body(place, count, which, slot) for the blocks of a window. Blocks at its edges are whole too, as far as there are channels.
template <class Acc, class F>
inline __attribute__((always_inline)) void over_window(const WindowBlocks& window, const F& body) {
  if (window.first == window.last) return;
  constexpr std::integral_constant<int64_t, lanes> whole;
  const auto edge = [&](int64_t place) __attribute__((always_inline)) {
    Acc flags[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) flags[lane] = place + lane >= window.start && place + lane < window.stop ? Acc{1} : Acc{0};
    const SomeInside<Acc> which{load_whole<Acc>(flags)};
    if (place + lanes <= window.channels) {
      body(place, whole, which, Slot<0>{});
    } else {
      body(place, window.channels - place, which, Slot<0>{});
    }
  };
  int64_t place = window.first;
  if (place < window.start) {
    edge(place);
    place += lanes;
  }
  for (; place + slots * lanes <= window.stop; place += slots * lanes) {
    body(place, whole, AllInside{}, Slot<0>{});
    body(place + lanes, whole, AllInside{}, Slot<1>{});
    body(place + 2 * lanes, whole, AllInside{}, Slot<2>{});
    body(place + 3 * lanes, whole, AllInside{}, Slot<3>{});
  }
  for (; place + lanes <= window.stop; place += lanes) body(place, whole, AllInside{}, Slot<1>{});
  if (place < window.last) edge(place);
}

template <class Acc>
inline __attribute__((always_inline)) Acc sum_of_slots(const Lanes<Acc> (&sums)[slots]) {
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
