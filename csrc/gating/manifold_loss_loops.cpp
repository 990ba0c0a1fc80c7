// CPU loops of manifold_loss, compiled once per CPU level. Distances go by sixteen lanes at every level and from block to block in double,
// neighbours are taken in order, and no product is fused with an add, so that the bits are the same at all levels.
#include "gating/manifold_loss.h"
#include "gating/row_runs.h"

namespace taskloom {
namespace {

constexpr int64_t block = manifold_block;

template <class Acc>
inline Acc squared_distance(const Acc* a, const Acc* b, int64_t n) {
  return sum_of_terms<Acc>(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> apart = load_some(a + place, count, Acc{0}) - load_some(b + place, count, Acc{0});
    return apart * apart;
  });
}

// sums = weight * (a - b), added to what `sums` has unless `first`.
template <class Acc>
inline void add_difference(const Acc* a, const Acc* b, Acc weight, bool first, int64_t n, Acc* sums) {
  const Lanes<Acc> factors = every_lane(weight);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> pull = factors * (load_some(a + place, count, Acc{0}) - load_some(b + place, count, Acc{0}));
    store_some(sums + place, count, (first ? every_lane(Acc{0}) : load_some(sums + place, count, Acc{0})) + pull);
  });
}

template <class Acc>
inline void double_run(Acc factor, int64_t n, Acc* values) {
  const Lanes<Acc> factors = every_lane(Acc{2} * factor);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(values + place, count, factors * load_some(values + place, count, Acc{0}));
  });
}

// The table's row of a neighbour; -1 where there is none.
template <class Acc>
inline int64_t neighbour_of(const ManifoldLoss& view, int64_t place, Acc weight) {
  const int64_t row = index_at(view.ids, place);
  return weight == 0 || row >= view.known ? -1 : row;
}

// Calls body(slot, row) for the neighbours of a row in order.
template <class Acc, class F>
inline __attribute__((always_inline)) void over_neighbours(const ManifoldLoss& view, int64_t row, const Acc* weights, const F& body) {
  for (int64_t slot = 0; slot < view.neighbours; ++slot) {
    const int64_t known = neighbour_of(view, row * view.neighbours + slot, weights[slot]);
    if (known >= 0) body(slot, known);
  }
}

// Asks for the table's rows that a row's neighbours are, as far as a block goes: they lie anywhere.
inline void prefetch_neighbours(const ManifoldLoss& view, int64_t row, int64_t end) {
  if (row >= end) return;
  const int64_t n = view.width < block ? view.width : block;
  for (int64_t slot = 0; slot < view.neighbours; ++slot) {
    const int64_t known = index_at(view.ids, row * view.neighbours + slot);
    if (known >= 0 && known < view.known) prefetch_block(view.reference.dtype, view.reference.data, known * view.width, n);
  }
}

template <class Acc>
void forward_as(const ManifoldLoss& view, int64_t begin, int64_t end, Acc* loss, double* distances, Acc* scratch) {
  Acc *const loaded = scratch, *const loaded_known = loaded + block, *const weights = loaded_known + block;
  for (int64_t row = begin; row < end; ++row) {
    prefetch_neighbours(view, row + 1, end);
    load_block(view.weight.dtype, view.weight.data, row * view.neighbours, view.neighbours, weights);
    for (int64_t slot = 0; slot < view.neighbours; ++slot) distances[slot] = 0;
    for (int64_t at = 0; at < view.width; at += block) {
      const int64_t n = view.width - at < block ? view.width - at : block;
      const Acc* const r = read_run(view.r, row * view.width + at, n, loaded);
      over_neighbours(view, row, weights, [&](int64_t slot, int64_t known) {
        const Acc* const other = read_run(view.reference, known * view.width + at, n, loaded_known);
        distances[slot] += static_cast<double>(squared_distance(r, other, n));
      });
    }
    Acc sum{0};
    over_neighbours(view, row, weights, [&](int64_t slot, int64_t) { sum += weights[slot] * static_cast<Acc>(distances[slot]); });
    loss[row] = sum;
  }
}

template <class Acc>
void backward_as(const ManifoldLoss& view, const Elements& gradient, int64_t begin, int64_t end, void* for_r, Acc* scratch) {
  Acc *const loaded = scratch, *const loaded_known = loaded + block, *const made = loaded_known + block, *const weights = made + block;
  for (int64_t row = begin; row < end; ++row) {
    prefetch_neighbours(view, row + 1, end);
    load_block(view.weight.dtype, view.weight.data, row * view.neighbours, view.neighbours, weights);
    Acc slope;
    load_block(gradient.dtype, gradient.data, row, 1, &slope);
    for (int64_t at = 0; at < view.width; at += block) {
      const int64_t n = view.width - at < block ? view.width - at : block, offset = row * view.width + at;
      const Acc* const r = read_run(view.r, offset, n, loaded);
      Acc* const out = target_run(view.r.dtype, for_r, offset, made);
      bool first = true;
      over_neighbours(view, row, weights, [&](int64_t slot, int64_t known) {
        const Acc* const other = read_run(view.reference, known * view.width + at, n, loaded_known);
        add_difference(r, other, weights[slot], first, n, out);
        first = false;
      });
      if (first) {
        fill_run(out, n, Acc{0});
      } else {
        double_run(slope, n, out);
      }
      write_run(view.r.dtype, for_r, offset, n, out);
    }
  }
}

void forward(bool wide, const ManifoldLoss& view, int64_t begin, int64_t end, void* loss, void* scratch) {
  double* const distances = static_cast<double*>(scratch);
  if (wide) {
    forward_as(view, begin, end, static_cast<double*>(loss), distances, distances + view.neighbours);
  } else {
    forward_as(view, begin, end, static_cast<float*>(loss), distances, reinterpret_cast<float*>(distances + view.neighbours));
  }
}

void backward(bool wide, const ManifoldLoss& view, const Elements& gradient, int64_t begin, int64_t end, void* for_r, void* scratch) {
  if (wide) {
    backward_as(view, gradient, begin, end, for_r, static_cast<double*>(scratch));
  } else {
    backward_as(view, gradient, begin, end, for_r, static_cast<float*>(scratch));
  }
}

const ManifoldLossLoops table = {forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(ManifoldLossLoops, manifold_loss_loops, table)

}  // namespace taskloom
