// CPU loops of expert_combine, compiled once per CPU level. A token's slots are added up in order, dot products go by sixteen lanes at
// every level and from block to block in double, and no product is fused with an add, so that the bits are the same at all levels.
#include "gating/expert_combine.h"
#include "gating/row_runs.h"

namespace taskloom {
namespace {

constexpr int64_t block = expert_combine_block, most_rows = expert_combine_rows;

// sums = weighed sum of `count` rows' runs of n entries, added to what `sums` has unless `first`.
template <class Acc>
inline void add_rows(const Acc* const* rows, const Acc* weights, int64_t count, bool first, int64_t n, Acc* sums) {
  over_strips(n, [&](int64_t place, auto size, auto strips) __attribute__((always_inline)) {
    Lanes<Acc> sum[strips];
    for (int i = 0; i < strips; ++i) sum[i] = first ? every_lane(Acc{0}) : load_some(sums + place + i * lanes, size, Acc{0});
    for (int64_t row = 0; row < count; ++row) {
      const Lanes<Acc> weight = every_lane(weights[row]);
      for (int i = 0; i < strips; ++i) sum[i] = sum[i] + weight * load_some(rows[row] + place + i * lanes, size, Acc{0});
    }
    for (int i = 0; i < strips; ++i) store_some(sums + place + i * lanes, size, sum[i]);
  });
}

template <class Acc>
inline void scale_run(const Acc* from, Acc factor, int64_t n, Acc* to) {
  const Lanes<Acc> factors = every_lane(factor);
  over_lanes(n, [&](int64_t place, auto count)
                    __attribute__((always_inline)) { store_some(to + place, count, factors * load_some(from + place, count, Acc{0})); });
}

// dots += the dot product of a run with each of `count` rows' runs, which are read together so that memory is not waited for row by row.
template <int count, class Acc>
inline void add_dots(const Acc* run, const Acc* const* rows, int64_t n, double* dots) {
  Lanes<Acc> sums[count];
  for (auto& sum : sums) sum = every_lane(Acc{0});
  over_lanes(n, [&](int64_t place, auto size) __attribute__((always_inline)) {
    const Lanes<Acc> own = load_some(run + place, size, Acc{0});
    for (int row = 0; row < count; ++row) sums[row] = sums[row] + own * load_some(rows[row] + place, size, Acc{0});
  });
  for (int row = 0; row < count; ++row) dots[row] += static_cast<double>(sum_of_lanes(sums[row]));
}

template <class Acc>
inline void add_dots(const Acc* run, const Acc* const* rows, int64_t count, int64_t n, double* dots) {
  static_assert(expert_dot_rows == 4);
  switch (count) {
    case 4:
      return add_dots<4>(run, rows, n, dots);
    case 3:
      return add_dots<3>(run, rows, n, dots);
    case 2:
      return add_dots<2>(run, rows, n, dots);
    default:
      return add_dots<1>(run, rows, n, dots);
  }
}

template <class Acc>
void forward_as(const ExpertCombine& view, int64_t begin, int64_t end, Acc* scratch) {
  Acc *const loaded = scratch, *const made = loaded + most_rows * block, *const weights = made + block;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t first_slot = token * view.slots;
    load_block(view.weight.dtype, view.weight.data, first_slot, view.slots, weights);
    for (int64_t at = 0; at < view.width; at += block) {
      const int64_t n = view.width - at < block ? view.width - at : block, offset = token * view.width + at;
      Acc* const out = target_run(view.y.dtype, view.out, offset, made);
      if (view.slots == 0) fill_run(out, n, Acc{0});
      for (int64_t slot = 0; slot < view.slots; slot += most_rows) {
        const int64_t count = view.slots - slot < most_rows ? view.slots - slot : most_rows;
        const Acc* rows[most_rows];
        for (int64_t i = 0; i < count; ++i) {
          rows[i] = read_run(view.y, row_at(view.inverse, first_slot + slot + i, view.rows) * view.width + at, n, loaded + i * block);
        }
        add_rows(rows, weights + slot, count, slot == 0, n, out);
      }
      write_run(view.y.dtype, view.out, offset, n, out);
    }
  }
}

template <class Acc>
void backward_as(const ExpertCombineBackward& view, int64_t begin, int64_t end, Acc* scratch, double* dots) {
  const ExpertCombine& f = view.forward;
  Acc *const loaded_gradient = scratch, *const loaded = loaded_gradient + block, *const made = loaded + expert_dot_rows * block,
             *const weights = made + block;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t first_slot = token * f.slots;
    load_block(f.weight.dtype, f.weight.data, first_slot, f.slots, weights);
    for (int64_t slot = 0; slot < f.slots; ++slot) dots[slot] = 0;
    for (int64_t at = 0; at < f.width; at += block) {
      const int64_t n = f.width - at < block ? f.width - at : block;
      const auto place_of = [&](int64_t slot) { return row_at(f.inverse, first_slot + slot, f.rows) * f.width + at; };
      const Acc* const gradient = read_run(view.gradient, token * f.width + at, n, loaded_gradient);
      for (int64_t slot = 0; view.for_weight != nullptr && slot < f.slots; slot += expert_dot_rows) {
        const int64_t count = f.slots - slot < expert_dot_rows ? f.slots - slot : expert_dot_rows;
        const Acc* rows[expert_dot_rows];
        for (int64_t i = 0; i < count; ++i) rows[i] = read_run(f.y, place_of(slot + i), n, loaded + i * block);
        add_dots(gradient, rows, count, n, dots + slot);
      }
      for (int64_t slot = 0; view.for_y != nullptr && slot < f.slots; ++slot) {
        const int64_t offset = place_of(slot);
        Acc* const out = target_run(f.y.dtype, view.for_y, offset, made);
        scale_run(gradient, weights[slot], n, out);
        write_run(f.y.dtype, view.for_y, offset, n, out);
      }
    }
    if (view.for_weight != nullptr) store_block(f.weight.dtype, dots, f.slots, view.for_weight, first_slot);
  }
}

void forward(bool wide, const ExpertCombine& view, int64_t begin, int64_t end, void* scratch) {
  if (wide) {
    forward_as(view, begin, end, static_cast<double*>(scratch));
  } else {
    forward_as(view, begin, end, static_cast<float*>(scratch));
  }
}

void backward(bool wide, const ExpertCombineBackward& view, int64_t begin, int64_t end, void* scratch) {
  double* const dots = static_cast<double*>(scratch);
  if (wide) {
    backward_as(view, begin, end, dots + view.forward.slots, dots);
  } else {
    backward_as(view, begin, end, reinterpret_cast<float*>(dots + view.forward.slots), dots);
  }
}

const ExpertCombineLoops table = {forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(ExpertCombineLoops, expert_combine_loops, table)

}  // namespace taskloom
