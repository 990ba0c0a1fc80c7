// CPU loops of stream_softmax_mix's backward, compiled once per CPU level: a tile of experts predicts a sequence again, and gives what it
// adds to the gradients. Sums go by sixteen lanes and in a fixed order, and no product is fused with an add, so that the bits are the same
// at all levels.
#include "gating/stream_softmax.h"
#include "gating/stream_softmax_tile.h"

namespace taskloom {
namespace {

// Dimensions that are added up together.
constexpr int dims_at_once = 4;

// One sequence's values, and what one tile of experts makes of them; rows of `predictions` and `scores` are `tile` apart.
template <class Acc>
struct SequenceTile {
  const Acc *x, *y, *for_pred, *for_lse, *pred, *lse;
  int64_t pairs, dims, tile, padded;
  const Acc* weights;
  Acc *predictions, *scores;

  Acc slope_of_pred(int64_t k) const { return for_pred == nullptr ? Acc{0} : for_pred[k]; }
  Acc slope_of_lse(int64_t k) const { return for_lse == nullptr ? Acc{0} : for_lse[k]; }

  void predict_all(Acc scale, Acc* squares) const {
    Lanes<Acc> top[stream_pairs];
    int64_t k = 0;
    for (; k + stream_pairs <= pairs; k += stream_pairs) {
      predict<stream_pairs>(x, y, k, dims, weights, tile, padded, scale, squares, predictions + k * tile, scores + k * tile, top);
    }
    for (; k < pairs; ++k) predict<1>(x, y, k, dims, weights, tile, padded, scale, squares, predictions + k * tile, scores + k * tile, top);
  }

  // Puts the gradients of predictions in their place, and adds those of targets up by lane.
  void differentiate(Acc scale, Acc* for_y) const {
    const Lanes<Acc> factor = every_lane(Acc{2} * scale);
    for (int64_t m = 0; m < padded; m += lanes) {
      // What pairs after this one give to the score of its error.
      Lanes<Acc> later = every_lane(Acc{0});
      for (int64_t k = pairs - 1; k >= 0; --k) {
        Acc* const place = predictions + k * tile + m;
        const Lanes<Acc> predicted = load_whole(place), posterior = exponential(load_whole(scores + k * tile + m) - every_lane(lse[k]));
        const Lanes<Acc> by_pred = every_lane(slope_of_pred(k)), slope = (every_lane(y[k]) - predicted) * later * factor;
        store_whole(for_y + k * lanes, load_whole(for_y + k * lanes) + slope);
        store_whole(place, by_pred * posterior - slope);
        later = later + posterior * (by_pred * (predicted - every_lane(pred[k])) + every_lane(slope_of_lse(k)));
      }
    }
  }

  template <int count>
  void add_to_inputs(int64_t k, int64_t d, Acc* for_x) const {
    Lanes<Acc> sums[count];
    for (int i = 0; i < count; ++i) sums[i] = every_lane(Acc{0});
    for (int64_t m = 0; m < padded; m += lanes) {
      const Lanes<Acc> slope = load_whole(predictions + k * tile + m);
      for (int i = 0; i < count; ++i) sums[i] = sums[i] + slope * load_whole(weights + (d + i) * tile + m);
    }
    for (int i = 0; i < count; ++i) for_x[k * dims + d + i] += sum_of_lanes(sums[i]);
  }

  void add_to_inputs(Acc* for_x) const {
    for (int64_t k = 0; k < pairs; ++k) {
      int64_t d = 0;
      for (; d + dims_at_once <= dims; d += dims_at_once) add_to_inputs<dims_at_once>(k, d, for_x);
      for (; d < dims; ++d) add_to_inputs<1>(k, d, for_x);
    }
  }

  void add_to_experts(Acc* for_weights) const {
    for (int64_t m = 0; m < padded; m += lanes) {
      for (int64_t d = 0; d < dims; ++d) {
        Lanes<Acc> sum = load_whole(for_weights + d * tile + m);
        for (int64_t k = 0; k < pairs; ++k) sum = sum + load_whole(predictions + k * tile + m) * every_lane(x[k * dims + d]);
        store_whole(for_weights + d * tile + m, sum);
      }
    }
  }
};

template <class Acc>
inline const Acc* row_of(const void* data, int64_t offset) {
  return data == nullptr ? nullptr : static_cast<const Acc*>(data) + offset;
}

template <class Acc>
void part_as(const StreamBackward& view, const StreamParts& parts, int64_t part, Acc* scratch) {
  const StreamSoftmax& f = view.forward;
  const int64_t pairs = f.pairs, dims = f.dims, tile = parts.tile, inputs = pairs * dims;
  Acc *const weights = scratch, *const for_weights = weights + dims * tile, *const squares = for_weights + dims * tile;
  Acc *const predictions = squares + tile, *const scores = predictions + pairs * tile, *const row = scores + pairs * tile;
  Acc *const x = row + dims, *const y = x + inputs, *const by_target = y + pairs;
  const int64_t start = part * parts.size, stop = f.count - start < parts.size ? f.count : start + parts.size;
  Acc *const for_x = view.for_x == nullptr ? nullptr : static_cast<Acc*>(view.for_x) + part * f.batch * inputs,
             *const for_y = view.for_y == nullptr ? nullptr : static_cast<Acc*>(view.for_y) + part * f.batch * pairs;
  if (for_x != nullptr) fill_run(for_x, f.batch * inputs, Acc{0});
  if (for_y != nullptr) fill_run(for_y, f.batch * pairs, Acc{0});
  const Acc scale = static_cast<Acc>(-0.5 / (f.sigma * f.sigma));
  for (int64_t first = start; first < stop; first += tile) {
    const int64_t count = stop - first < tile ? stop - first : tile, padded = in_whole_lanes(count);
    load_tile(f, first, count, tile, row, weights);
    fill_run(for_weights, dims * tile, Acc{0});
    for (int64_t b = 0; b < f.batch; ++b) {
      const int64_t at = b * pairs;
      load_block(f.x.dtype, f.x.data, at * dims, inputs, x);
      load_block(f.y.dtype, f.y.data, at, pairs, y);
      const SequenceTile<Acc> one{x,
                                  y,
                                  row_of<Acc>(view.for_pred, at),
                                  row_of<Acc>(view.for_lse, at),
                                  row_of<Acc>(view.pred, at),
                                  row_of<Acc>(view.lse, at),
                                  pairs,
                                  dims,
                                  tile,
                                  padded,
                                  weights,
                                  predictions,
                                  scores};
      start_squares(count, padded, squares);
      fill_run(by_target, pairs * lanes, Acc{0});
      one.predict_all(scale, squares);
      one.differentiate(scale, by_target);
      if (for_x != nullptr) one.add_to_inputs(for_x + at * dims);
      if (view.for_experts != nullptr) one.add_to_experts(for_weights);
      for (int64_t k = 0; k < pairs && for_y != nullptr; ++k) for_y[at + k] += sum_of_lanes(load_whole(by_target + k * lanes));
    }
    for (int64_t m = 0; m < count && view.for_experts != nullptr; ++m) {
      for (int64_t d = 0; d < dims; ++d) row[d] = for_weights[d * tile + m];
      store_block(f.experts.dtype, row, dims, view.for_experts, (first + m) * dims);
    }
  }
}

void part(bool wide, const StreamBackward& view, const StreamParts& parts, int64_t number, void* scratch) {
  if (wide) {
    part_as(view, parts, number, static_cast<double*>(scratch));
  } else {
    part_as(view, parts, number, static_cast<float*>(scratch));
  }
}

const StreamBackwardLoops table = {part};

}  // namespace

TASKLOOM_EXPORT_LOOPS(StreamBackwardLoops, stream_softmax_backward_loops, table)

}  // namespace taskloom
