// CPU loops of multi_gate_combine, compiled once per CPU level. The experts of a sample are fetched once and stay in the nearest cache
// while all gates read them. Sums over experts or gates go in order, sums over the width by sixteen lanes, and no product is fused with an
// add, so that the bits are the same at all levels.
#include "gating/multi_gate.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

// Groups of lanes whose sums are kept in registers: as many as hide the latency of an add.
constexpr int groups = native_bytes == 64 ? 8 : native_bytes == 32 ? 4 : 2;

// One sample's rows in the dtype of the arithmetic, `stride` apart: where they lie, or converted.
template <class Acc>
struct Rows {
  const Acc* data;
  int64_t stride;

  const Acc* row(int64_t r) const { return data + r * stride; }
};

// Places first .. first + n of `rows` rows of `width`.
template <class Acc>
inline Rows<Acc> read_rows(const Elements& from, int64_t origin, int64_t rows, int64_t width, int64_t first, int64_t n, Acc* scratch) {
  if (from.dtype == dtype_of_arithmetic<Acc>) return {static_cast<const Acc*>(from.data) + origin + first, width};
  for (int64_t r = 0; r < rows; ++r) load_block(from.dtype, from.data, origin + r * width + first, n, scratch + r * n);
  return {scratch, n};
}

// out[place] = sum over a list of weights[column] * rows[column][place], in the order of the list.
template <class Acc>
inline void add_up_list(const Rows<Acc>& rows, const Acc* weights, int64_t weight_stride, const int32_t* begin, const int32_t* end,
                        int64_t n, Acc* out) {
  int64_t place = 0;
  for (; place + groups * lanes <= n; place += groups * lanes) {
    Lanes<Acc> sums[groups];
    for (int i = 0; i < groups; ++i) sums[i] = every_lane(Acc{0});
    for (const int32_t* column = begin; column != end; ++column) {
      const Lanes<Acc> weight = every_lane(weights[*column * weight_stride]);
      const Acc* const from = rows.row(*column) + place;
      for (int i = 0; i < groups; ++i) sums[i] = sums[i] + weight * load_whole(from + i * lanes);
    }
    for (int i = 0; i < groups; ++i) store_whole(out + place + i * lanes, sums[i]);
  }
  over_lanes(n - place, [&](int64_t rest, auto count) __attribute__((always_inline)) {
    Lanes<Acc> sum = every_lane(Acc{0});
    for (const int32_t* column = begin; column != end; ++column) {
      sum = sum + every_lane(weights[*column * weight_stride]) * load_some(rows.row(*column) + place + rest, count, Acc{0});
    }
    store_some(out + place + rest, count, sum);
  });
}

// The products of a row with `count` columns' rows, added to their sums.
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
  for (int i = 0; i < count; ++i) sums[columns[i]] += sum_of_lanes(parts[i]);
}

template <class Acc>
inline void softmax_of(const Acc* logits, const int32_t* begin, const int32_t* end, Acc* gathered, Acc* out) {
  const int64_t n = end - begin;
  Acc largest = -bits_infinity<Acc>();
  for (int64_t i = 0; i < n; ++i) {
    gathered[i] = logits[begin[i]];
    largest = gathered[i] > largest ? gathered[i] : largest;
  }
  const Lanes<Acc> top = every_lane(largest);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(gathered + place, count, exponential(load_some(gathered + place, count, Acc{0}) - top));
  });
  const Lanes<Acc> sum = every_lane(sum_of_run(gathered, n));
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(gathered + place, count, load_some(gathered + place, count, Acc{0}) / sum);
  });
  for (int64_t i = 0; i < n; ++i) out[begin[i]] = gathered[i];
}

template <class Acc>
inline void sigmoid_of(const Acc* logits, const int32_t* begin, const int32_t* end, Acc* gathered, Acc* out) {
  const int64_t n = end - begin;
  for (int64_t i = 0; i < n; ++i) gathered[i] = logits[begin[i]];
  const Lanes<Acc> one = every_lane(Acc{1}), zero = every_lane(Acc{0});
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> inner = load_some(gathered + place, count, Acc{0});
    store_some(gathered + place, count, one / (one + exponential(zero - inner)));
  });
  for (int64_t i = 0; i < n; ++i) out[begin[i]] = gathered[i];
}

// A sample's weights of its gates, of their self gates and of the two together.
template <class Acc>
struct Weights {
  Acc *read, *own, *either;
  Acc *row, *gathered;

  Weights(const MultiGate& view, Acc* scratch) : read(scratch) {
    const int64_t pairs = view.gates * view.experts;
    own = read + pairs;
    either = view.self_logits.data == nullptr ? read : own + pairs;
    row = own + 2 * pairs;
    gathered = row + view.experts;
  }

  // The first accumulator after them.
  Acc* end(const MultiGate& view) const { return gathered + view.experts + lanes; }

  void compute(const MultiGate& view, int64_t sample) {
    const int64_t experts = view.experts, pairs = view.gates * experts;
    gates_of(view, view.logits, view.read, sample, view.sigmoid, false, read);
    if (either == read) return;
    gates_of(view, view.self_logits, view.own, sample, false, true, own);
    for (int64_t i = 0; i < pairs; ++i) either[i] = read[i] + own[i];
  }

 private:
  void gates_of(const MultiGate& view, const Elements& logits, const RowLists& lists, int64_t sample, bool sigmoid, bool single_is_sigmoid,
                Acc* out) {
    const int64_t experts = view.experts;
    fill_run(out, view.gates * experts, Acc{0});
    for (int64_t g = 0; g < view.gates; ++g) {
      const int32_t *const begin = lists.columns + lists.begin[g], *const end = lists.columns + lists.begin[g + 1];
      load_block(logits.dtype, logits.data, (sample * view.gates + g) * experts, experts, row);
      if (sigmoid || (single_is_sigmoid && end - begin == 1)) {
        sigmoid_of(row, begin, end, gathered, out + g * experts);
      } else {
        softmax_of(row, begin, end, gathered, out + g * experts);
      }
    }
  }
};

template <class Acc>
void forward_as(const MultiGate& view, int64_t first, int64_t n, Acc* scratch) {
  const int64_t gates = view.gates, experts = view.experts, width = view.width, tile = multi_gate_tile(experts, width);
  Weights<Acc> weights(view, scratch);
  Acc *const loaded = weights.end(view), *const made = loaded + experts * tile;
  for (int64_t sample = first; sample < first + n; ++sample) {
    weights.compute(view, sample);
    store_block(dtype_of_arithmetic<Acc>, weights.read, gates * experts, view.probs, sample * gates * experts);
    for (int64_t place = 0; place < width; place += tile) {
      const int64_t count = width - place < tile ? width - place : tile;
      const Rows<Acc> z = read_rows(view.z, sample * experts * width, experts, width, place, count, loaded);
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t offset = (sample * gates + g) * width + place;
        Acc* const out = target_run(view.z.dtype, view.out, offset, made);
        const int32_t* const columns = view.either.columns;
        add_up_list(z, weights.either + g * experts, 1, columns + view.either.begin[g], columns + view.either.begin[g + 1], count, out);
        write_run(view.z.dtype, view.out, offset, count, out);
      }
    }
  }
}

// for_logits[e] from the gradients of a gate's weights: softmax p (s - sum p s), sigmoid p (1 - p) s.
template <class Acc>
inline void store_slopes(const RowLists& lists, int64_t gate, bool sigmoid, const Acc* probs, const Acc* slopes, int64_t experts, Acc* row,
                         DType dtype, void* to, int64_t offset) {
  const int32_t *const begin = lists.columns + lists.begin[gate], *const end = lists.columns + lists.begin[gate + 1];
  fill_run(row, experts, Acc{0});
  Acc inner = 0;
  for (const int32_t* e = begin; e != end; ++e) inner = inner + probs[*e] * slopes[*e];
  for (const int32_t* e = begin; e != end; ++e) {
    row[*e] = sigmoid ? probs[*e] * (Acc{1} - probs[*e]) * slopes[*e] : probs[*e] * (slopes[*e] - inner);
  }
  store_block(dtype, row, experts, to, offset);
}

template <class Acc>
void backward_as(const MultiGateBackward& view, int64_t first, int64_t n, Acc* scratch) {
  const MultiGate& f = view.forward;
  const int64_t gates = f.gates, experts = f.experts, width = f.width, tile = multi_gate_tile(experts, width), pairs = gates * experts;
  const bool for_gates = view.for_logits != nullptr || view.for_self != nullptr;
  Weights<Acc> weights(f, scratch);
  Acc *const slopes = weights.end(f), *const total = slopes + pairs, *const row = total + experts;
  Acc *const loaded = row + experts, *const loaded_gradient = loaded + experts * tile, *const made = loaded_gradient + gates * tile;
  for (int64_t sample = first; sample < first + n; ++sample) {
    weights.compute(f, sample);
    fill_run(slopes, pairs, Acc{0});
    for (int64_t place = 0; place < width; place += tile) {
      const int64_t count = width - place < tile ? width - place : tile;
      const Rows<Acc> gradient = read_rows(view.gradient, sample * gates * width, gates, width, place, count, loaded_gradient);
      if (for_gates) {
        const Rows<Acc> z = read_rows(f.z, sample * experts * width, experts, width, place, count, loaded);
        for (int64_t g = 0; g < gates; ++g) {
          const int32_t *e = f.either.columns + f.either.begin[g], *const end = f.either.columns + f.either.begin[g + 1];
          for (; e + groups <= end; e += groups) add_products<groups>(gradient.row(g), z, e, count, slopes + g * experts);
          for (; e + 2 <= end; e += 2) add_products<2>(gradient.row(g), z, e, count, slopes + g * experts);
          for (; e != end; ++e) add_products<1>(gradient.row(g), z, e, count, slopes + g * experts);
        }
      }
      if (view.for_z == nullptr) continue;
      for (int64_t e = 0; e < experts; ++e) {
        const int64_t offset = (sample * experts + e) * width + place;
        Acc* const out = target_run(f.z.dtype, view.for_z, offset, made);
        const int32_t* const columns = view.readers.columns;
        add_up_list(gradient, weights.either + e, experts, columns + view.readers.begin[e], columns + view.readers.begin[e + 1], count,
                    out);
        write_run(f.z.dtype, view.for_z, offset, count, out);
      }
    }
    if (!for_gates) continue;
    for (int64_t g = 0; g < gates; ++g) {
      const int64_t offset = (sample * gates + g) * experts;
      if (view.for_self != nullptr) {
        const bool single = f.own.begin[g + 1] - f.own.begin[g] == 1;
        store_slopes(f.own, g, single, weights.own + g * experts, slopes + g * experts, experts, row, f.self_logits.dtype, view.for_self,
                     offset);
      }
      if (view.for_logits == nullptr) continue;
      const Acc* given = slopes + g * experts;
      if (view.for_probs.data != nullptr) {
        load_block(view.for_probs.dtype, view.for_probs.data, offset, experts, total);
        for (int64_t e = 0; e < experts; ++e) total[e] = given[e] + total[e];
        given = total;
      }
      store_slopes(f.read, g, f.sigmoid, weights.read + g * experts, given, experts, row, f.logits.dtype, view.for_logits, offset);
    }
  }
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
