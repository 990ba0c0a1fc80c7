// Tiles of linear experts: their weights, and what they predict for some pairs. For NAME_loops.cpp files. Torch-free, internal linkage.
#pragma once

#include "gating/stream_softmax.h"
#include "routed/lane_spans.h"

namespace taskloom {
namespace {

// Experts first .. first + n of the pool, transposed: expert m at place m of each dimension's row of `tile`.
template <class Acc>
inline void load_tile(const StreamSoftmax& view, int64_t first, int64_t n, int64_t tile, Acc* row, Acc* out) {
  for (int64_t m = 0; m < n; ++m) {
    load_block(view.experts.dtype, view.experts.data, (first + m) * view.dims, view.dims, row);
    for (int64_t d = 0; d < view.dims; ++d) out[d * tile + m] = row[d];
  }
  const int64_t padded = (n + lanes - 1) / lanes * lanes;
  for (int64_t d = 0; d < view.dims; ++d) {
    for (int64_t m = n; m < padded; ++m) out[d * tile + m] = 0;
  }
}

// Predictions and scores of `together` pairs from pair `k` on by the experts of a tile; `squares` holds their squared errors so far.
template <int together, class Acc>
inline void predict(const Acc* x, const Acc* y, int64_t k, int64_t dims, const Acc* weights, int64_t tile, int64_t padded, Acc scale,
                    Acc* squares, Acc* predictions, Acc* scores, Lanes<Acc>* top) {
  for (int i = 0; i < together; ++i) top[i] = every_lane(-bits_infinity<Acc>());
  const Lanes<Acc> factor = every_lane(scale);
  for (int64_t m = 0; m < padded; m += lanes) {
    Lanes<Acc> predicted[together];
    for (int i = 0; i < together; ++i) predicted[i] = every_lane(Acc{0});
    for (int64_t d = 0; d < dims; ++d) {
      const Lanes<Acc> weight = load_whole(weights + d * tile + m);
      for (int i = 0; i < together; ++i) predicted[i] = predicted[i] + every_lane(x[(k + i) * dims + d]) * weight;
    }
    Lanes<Acc> square = load_whole(squares + m);
    for (int i = 0; i < together; ++i) {
      const Lanes<Acc> score = square * factor, error = every_lane(y[k + i]) - predicted[i];
      square = square + error * error;
      top[i] = larger(score, top[i]);
      store_whole(predictions + i * tile + m, predicted[i]);
      store_whole(scores + i * tile + m, score);
    }
    store_whole(squares + m, square);
  }
}

// What squared errors start from: 0, and infinity at places after the last expert, whose likelihood is then 0 from the start.
template <class Acc>
inline void start_squares(int64_t count, int64_t padded, Acc* squares) {
  for (int64_t m = 0; m < padded; ++m) squares[m] = m < count ? Acc{0} : bits_infinity<Acc>();
}

inline int64_t in_whole_lanes(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

}  // namespace
}  // namespace taskloom
