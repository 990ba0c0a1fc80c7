// CPU loops of multi_gate_combine, compiled once per CPU level. The experts of a sample are fetched once and stay in the nearest cache
// while all gates read them. Sums over experts or gates go in order, sums over the width by sixteen lanes, and no product is fused with an
// add, so that the bits are the same at all levels.
#include "gating/multi_gate.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

// Groups of lanes whose sums are kept in registers: as many as hide the latency of an add.
constexpr int groups = native_bytes == 64 ? 8 : native_bytes == 32 ? 4 : 2;

// One sample's rows, or pieces of them, in the dtype of the arithmetic.
template <class Acc>
struct Rows {
  const Acc* data;
  int64_t stride;

  const Acc* row(int64_t r) const { return data + r * stride; }
};

// Places first .. first + n of the rows of `width` that somebody reads. They are copied even where they could be read in place: what all
// gates read is then fetched in the order in which it lies, which takes half of the time.
template <class Acc>
inline Rows<Acc> read_rows(const Elements& from, const RowLists& readers, int64_t origin, int64_t rows, int64_t width, int64_t first,
                           int64_t n, Acc* scratch) {
  for (int64_t r = 0; r < rows; ++r) {
    if (readers.begin[r] == readers.begin[r + 1]) continue;
    load_block(from.dtype, from.data, origin + r * width + first, n, scratch + r * n);
  }
  return {scratch, n};
}

// out[place] = sum over a list of weights[column * stride] * rows[column][place], in the order of the list.
template <class Acc>
inline void add_up_list(const Rows<Acc>& rows, const Acc* weights, int64_t stride, const int32_t* begin, const int32_t* end, int64_t n,
                        Acc* out) {
  int64_t place = 0;
  for (; place + groups * lanes <= n; place += groups * lanes) {
    Lanes<Acc> sums[groups];
    for (int i = 0; i < groups; ++i) sums[i] = every_lane(Acc{0});
    for (const int32_t* column = begin; column != end; ++column) {
      const Lanes<Acc> weight = every_lane(weights[*column * stride]);
      const Acc* const from = rows.row(*column) + place;
      for (int i = 0; i < groups; ++i) sums[i] = sums[i] + weight * load_whole(from + i * lanes);
    }
    for (int i = 0; i < groups; ++i) store_whole(out + place + i * lanes, sums[i]);
  }
  over_lanes(n - place, [&](int64_t rest, auto count) __attribute__((always_inline)) {
    Lanes<Acc> sum = every_lane(Acc{0});
    for (const int32_t* column = begin; column != end; ++column) {
      sum = sum + every_lane(weights[*column * stride]) * load_some(rows.row(*column) + place + rest, count, Acc{0});
    }
    store_some(out + place + rest, count, sum);
  });
}

// The products of a row with `count` columns' rows, added to sums[column * lanes].
template <int count, class Acc>
inline void add_products(const Acc* row, const Rows<Acc>& rows, const int32_t* columns, int64_t n, Acc* sums) {
  Lanes<Acc> parts[count];
  const Acc* from[count];
  for (int i = 0; i < count; ++i) {
    parts[i] = every_lane(Acc{0});
    from[i] = rows.row(columns[i]);
  }
  over_lanes(n, [&](int64_t place, auto some) __attribute__((always_inline)) {
    const Lanes<Acc> factor = load_some(row + place, some, Acc{0});
    for (int i = 0; i < count; ++i) parts[i] = parts[i] + factor * load_some(from[i] + place, some, Acc{0});
  });
  for (int i = 0; i < count; ++i) sums[columns[i] * lanes] += sum_of_lanes(parts[i]);
}

// The entries of up to sixteen samples that follow each other, as lanes: entry i of sample s at out[i * lanes + s].
template <class Acc>
inline Lanes<Acc> gather(const Acc* rows, int64_t entries, int64_t n, int64_t entry) {
  Acc all[lanes];
  for (int64_t s = 0; s < lanes; ++s) all[s] = s < n ? load_at<Acc>(rows, s * entries + entry) : Acc{0};
  return load_whole(all);
}

template <class Acc>
inline void scatter(const Lanes<Acc>& values, int64_t entries, int64_t n, int64_t entry, Acc* rows) {
  Acc all[lanes];
  store_whole(all, values);
  for (int64_t s = 0; s < n; ++s) store_at(rows, s * entries + entry, all[s]);
}

// Softmax of a list of entries, each of sixteen samples.
template <class Acc>
inline void softmax_of(const Acc* rows, int64_t entries, int64_t n, const int32_t* begin, const int32_t* end, int64_t row, Acc* out) {
  Lanes<Acc> largest = every_lane(-bits_infinity<Acc>()), sum = every_lane(Acc{0});
  for (const int32_t* e = begin; e != end; ++e) {
    const Lanes<Acc> logit = gather(rows, entries, n, row + *e);
    store_whole(out + *e * lanes, logit);
    largest = larger(largest, logit);
  }
  for (const int32_t* e = begin; e != end; ++e) {
    const Lanes<Acc> power = exponential(load_whole(out + *e * lanes) - largest);
    store_whole(out + *e * lanes, power);
    sum = sum + power;
  }
  for (const int32_t* e = begin; e != end; ++e) store_whole(out + *e * lanes, load_whole(out + *e * lanes) / sum);
}

template <class Acc>
inline void sigmoid_of(const Acc* rows, int64_t entries, int64_t n, const int32_t* begin, const int32_t* end, int64_t row, Acc* out) {
  const Lanes<Acc> one = every_lane(Acc{1}), zero = every_lane(Acc{0});
  for (const int32_t* e = begin; e != end; ++e) {
    store_whole(out + *e * lanes, one / (one + exponential(zero - gather(rows, entries, n, row + *e))));
  }
}

// The weights of sixteen samples by their gates, by their self gates and by the two together: [gates, experts, lanes] each.
template <class Acc>
struct Weights {
  Acc *read, *own, *either;
  Acc* rows;  // [lanes, gates, experts] of scratch

  Weights(const MultiGate& view, Acc* scratch) : read(scratch) {
    const int64_t size = view.gates * view.experts * lanes;
    own = read + size;
    either = view.self_logits.data == nullptr ? read : own + size;
    rows = own + 2 * size;
    // What no list holds stays 0.
    fill_run(read, size, Acc{0});
    if (either != read) fill_run(own, size, Acc{0});
  }

  // The first accumulator after them.
  Acc* end(const MultiGate& view) const { return rows + view.gates * view.experts * lanes; }

  void compute(const MultiGate& view, int64_t first, int64_t n) {
    gates_of(view, view.logits, view.read, first, n, view.sigmoid, false, read);
    if (either == read) return;
    gates_of(view, view.self_logits, view.own, first, n, false, true, own);
    for (int64_t i = 0; i < view.gates * view.experts * lanes; i += lanes) {
      store_whole(either + i, load_whole(read + i) + load_whole(own + i));
    }
  }

 private:
  void gates_of(const MultiGate& view, const Elements& logits, const RowLists& lists, int64_t first, int64_t n, bool sigmoid,
                bool single_is_sigmoid, Acc* out) {
    const int64_t experts = view.experts, pairs = view.gates * experts;
    const Acc* const given = read_run(logits, first * pairs, n * pairs, rows);
    for (int64_t g = 0; g < view.gates; ++g) {
      const int32_t *const begin = lists.columns + lists.begin[g], *const end = lists.columns + lists.begin[g + 1];
      if (sigmoid || (single_is_sigmoid && end - begin == 1)) {
        sigmoid_of(given, pairs, n, begin, end, g * experts, out + g * experts * lanes);
      } else {
        softmax_of(given, pairs, n, begin, end, g * experts, out + g * experts * lanes);
      }
    }
  }
};

template <class Acc>
inline void store_lanes_of_samples(const Acc* values, int64_t pairs, int64_t first, int64_t n, Acc* rows, DType dtype, void* to) {
  Acc* const made = target_run(dtype, to, first * pairs, rows);
  for (int64_t pair = 0; pair < pairs; ++pair) scatter(load_whole(values + pair * lanes), pairs, n, pair, made);
  write_run(dtype, to, first * pairs, n * pairs, made);
}

template <class Acc>
void forward_group(const MultiGate& view, Weights<Acc>& weights, int64_t first, int64_t n) {
  const int64_t gates = view.gates, experts = view.experts, width = view.width, tile = multi_gate_tile(experts, width);
  Acc *const loaded = weights.end(view), *const made = loaded + experts * tile;
  weights.compute(view, first, n);
  store_lanes_of_samples(weights.read, gates * experts, first, n, weights.rows, dtype_of_arithmetic<Acc>, view.probs);
  for (int64_t s = 0; s < n; ++s) {
    for (int64_t place = 0; place < width; place += tile) {
      const int64_t count = width - place < tile ? width - place : tile;
      const Rows<Acc> z = read_rows(view.z, view.readers, (first + s) * experts * width, experts, width, place, count, loaded);
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t offset = ((first + s) * gates + g) * width + place;
        Acc* const out = target_run(view.z.dtype, view.out, offset, made);
        const int32_t *const begin = view.either.columns + view.either.begin[g], *const end =
                                                                                     view.either.columns + view.either.begin[g + 1];
        add_up_list(z, weights.either + g * experts * lanes + s, lanes, begin, end, count, out);
        write_run(view.z.dtype, view.out, offset, count, out);
      }
    }
  }
}

// The gradients of logits from those of weights: softmax p (s - sum p s), sigmoid p (1 - p) s. They take the slopes' place, and are 0 where
// no list holds an entry.
template <class Acc>
inline void slopes_of_logits(const RowLists& lists, int64_t gates, int64_t experts, const Acc* probs, const Acc* slopes, bool sigmoid,
                             bool single_is_sigmoid, Acc* out) {
  const Lanes<Acc> one = every_lane(Acc{1});
  fill_run(out, gates * experts * lanes, Acc{0});
  for (int64_t g = 0; g < gates; ++g) {
    const int32_t *const begin = lists.columns + lists.begin[g], *const end = lists.columns + lists.begin[g + 1];
    const Acc *const p = probs + g * experts * lanes, *const slope = slopes + g * experts * lanes;
    Acc* const to = out + g * experts * lanes;
    const bool each = sigmoid || (single_is_sigmoid && end - begin == 1);
    Lanes<Acc> inner = every_lane(Acc{0});
    for (const int32_t* e = begin; e != end && !each; ++e) inner = inner + load_whole(p + *e * lanes) * load_whole(slope + *e * lanes);
    for (const int32_t* e = begin; e != end; ++e) {
      const Lanes<Acc> weight = load_whole(p + *e * lanes), given = load_whole(slope + *e * lanes);
      store_whole(to + *e * lanes, each ? weight * (one - weight) * given : weight * (given - inner));
    }
  }
}

// The products of each gate's gradient with the experts that it reads, for one sample and some places of the width.
template <class Acc>
inline void add_slopes(const MultiGate& view, const Rows<Acc>& gradient, const Rows<Acc>& z, int64_t count, Acc* slopes) {
  for (int64_t g = 0; g < view.gates; ++g) {
    const int32_t *e = view.either.columns + view.either.begin[g], *const end = view.either.columns + view.either.begin[g + 1];
    Acc* const sums = slopes + g * view.experts * lanes;
    for (; e + groups <= end; e += groups) add_products<groups>(gradient.row(g), z, e, count, sums);
    for (; e + 4 <= end; e += 4) add_products<4>(gradient.row(g), z, e, count, sums);
    for (; e + 2 <= end; e += 2) add_products<2>(gradient.row(g), z, e, count, sums);
    for (; e != end; ++e) add_products<1>(gradient.row(g), z, e, count, sums);
  }
}

template <class Acc>
void backward_group(const MultiGateBackward& view, Weights<Acc>& weights, int64_t first, int64_t n) {
  const MultiGate& f = view.forward;
  const int64_t gates = f.gates, experts = f.experts, width = f.width, tile = multi_gate_tile(experts, width), pairs = gates * experts;
  const bool for_gates = view.for_logits != nullptr || view.for_self != nullptr;
  Acc *const slopes = weights.end(f), *const found = slopes + pairs * lanes;
  Acc *const loaded = found + pairs * lanes, *const loaded_gradient = loaded + experts * tile, *const made = loaded_gradient + gates * tile;
  weights.compute(f, first, n);
  fill_run(slopes, pairs * lanes, Acc{0});
  for (int64_t s = 0; s < n; ++s) {
    for (int64_t place = 0; place < width; place += tile) {
      const int64_t count = width - place < tile ? width - place : tile;
      // Every gate reads something.
      const Rows<Acc> gradient =
          read_rows(view.gradient, f.either, (first + s) * gates * width, gates, width, place, count, loaded_gradient);
      if (for_gates) {
        const Rows<Acc> z = read_rows(f.z, f.readers, (first + s) * experts * width, experts, width, place, count, loaded);
        add_slopes(f, gradient, z, count, slopes + s);
      }
      if (view.for_z == nullptr) continue;
      for (int64_t e = 0; e < experts; ++e) {
        const int64_t offset = ((first + s) * experts + e) * width + place;
        Acc* const out = target_run(f.z.dtype, view.for_z, offset, made);
        const int32_t *const begin = f.readers.columns + f.readers.begin[e], *const end = f.readers.columns + f.readers.begin[e + 1];
        add_up_list(gradient, weights.either + e * lanes + s, experts * lanes, begin, end, count, out);
        write_run(f.z.dtype, view.for_z, offset, count, out);
      }
    }
  }
  if (view.for_self != nullptr) {
    slopes_of_logits(f.own, gates, experts, weights.own, slopes, false, true, found);
    store_lanes_of_samples(found, pairs, first, n, weights.rows, f.self_logits.dtype, view.for_self);
  }
  if (view.for_logits == nullptr) return;
  if (view.for_probs.data != nullptr) {
    const Acc* const given = read_run(view.for_probs, first * pairs, n * pairs, weights.rows);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      store_whole(slopes + pair * lanes, load_whole(slopes + pair * lanes) + gather(given, pairs, n, pair));
    }
  }
  slopes_of_logits(f.read, gates, experts, weights.read, slopes, f.sigmoid, false, found);
  store_lanes_of_samples(found, pairs, first, n, weights.rows, f.logits.dtype, view.for_logits);
}

template <class Acc>
void forward_as(const MultiGate& view, int64_t begin, int64_t n, Acc* scratch) {
  Weights<Acc> weights(view, scratch);
  for (int64_t s = 0; s < n; s += lanes) forward_group(view, weights, begin + s, n - s < lanes ? n - s : lanes);
}

template <class Acc>
void backward_as(const MultiGateBackward& view, int64_t begin, int64_t n, Acc* scratch) {
  Weights<Acc> weights(view.forward, scratch);
  for (int64_t s = 0; s < n; s += lanes) backward_group(view, weights, begin + s, n - s < lanes ? n - s : lanes);
}

void forward(bool wide, const MultiGate& view, int64_t begin, int64_t n, void* scratch) {
  if (wide) {
    forward_as(view, begin, n, static_cast<double*>(scratch));
  } else {
    forward_as(view, begin, n, static_cast<float*>(scratch));
  }
}

void backward(bool wide, const MultiGateBackward& view, int64_t begin, int64_t n, void* scratch) {
  if (wide) {
    backward_as(view, begin, n, static_cast<double*>(scratch));
  } else {
    backward_as(view, begin, n, static_cast<float*>(scratch));
  }
}

const MultiGateLoops table = {forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MultiGateLoops, multi_gate_loops, table)

}  // namespace taskloom
