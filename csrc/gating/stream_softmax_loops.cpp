// CPU loops of stream_softmax_mix, compiled once per CPU level: sixteen experts at a time, an online softmax for each pair. Sums go by
// sixteen lanes and in a fixed order, and no product is fused with an add, so that the bits are the same at all levels.
#include "gating/stream_softmax.h"
#include "gating/stream_softmax_tile.h"

namespace taskloom {
namespace {

// Whether a lane is not below a bound: also where it is NaN.
inline __attribute__((always_inline)) bool any_not_below(const Lanes<float>& a, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a.part[0], _mm512_set1_ps(bound), _CMP_NLT_UQ) != 0;
#elif defined(__AVX2__)
  const __m256 b = _mm256_set1_ps(bound);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.part[0], b, _CMP_NLT_UQ), _mm256_cmp_ps(a.part[1], b, _CMP_NLT_UQ))) != 0;
#elif defined(__SSE2__)
  const __m128 b = _mm_set1_ps(bound);
  __m128 any = _mm_cmpnlt_ps(a.part[0], b);
  for (int i = 1; i < Lanes<float>::parts; ++i) any = _mm_or_ps(any, _mm_cmpnlt_ps(a.part[i], b));
  return _mm_movemask_ps(any) != 0;
#else
  bool any = false;
  for (int i = 0; i < Lanes<float>::parts; ++i)
    for (int lane = 0; lane < native_bytes / 4; ++lane) any |= !(a.part[i][lane] < bound);
  return any;
#endif
}

inline __attribute__((always_inline)) bool any_not_below(const Lanes<double>& a, double bound) {
  bool any = false;
  for (int i = 0; i < Lanes<double>::parts; ++i)
    for (int lane = 0; lane < native_bytes / 8; ++lane) any |= !(a.part[i][lane] < bound);
  return any;
}

template <class Acc>
inline Acc exponential_of(Acc x) {
  Acc all[lanes];
  store_whole(all, exponential(every_lane(x)));
  return all[0];
}

template <class Acc>
inline Acc largest_lane(const Lanes<Acc>& a) {
  Acc all[lanes];
  store_whole(all, a);
  Acc found = all[0];
  for (int lane = 1; lane < lanes; ++lane) found = all[lane] > found ? all[lane] : found;
  return found;
}

// What scores are taken relative to: their maximum, or 0 where none is finite, so that -inf stays -inf.
template <class Acc>
inline Acc center_of(Acc largest) {
  return largest == -bits_infinity<Acc>() ? Acc{0} : largest;
}

// The online softmax of one pair of one sequence.
template <class Acc>
struct Online {
  Acc* largest;
  Acc* sum;       // lanes
  Acc* weighted;  // lanes

  void start() const {
    *largest = -bits_infinity<Acc>();
    store_whole(sum, every_lane(Acc{0}));
    store_whole(weighted, every_lane(Acc{0}));
  }

  // Takes in the scores and predictions of `n` experts, a multiple of sixteen; `top` holds the largest scores by lane.
  void add(const Acc* scores, const Acc* predictions, int64_t n, const Lanes<Acc>& top) const {
    Lanes<Acc> total = load_whole(sum), mixed = load_whole(weighted);
    const Acc highest = largest_lane(top);
    if (highest > *largest) {
      const Lanes<Acc> shrink = every_lane(exponential_of(*largest - highest));
      total = total * shrink;
      mixed = mixed * shrink;
      *largest = highest;
    }
    const Lanes<Acc> center = every_lane(center_of(*largest));
    for (int64_t m = 0; m < n; m += lanes) {
      const Lanes<Acc> below = load_whole(scores + m) - center;
      // After a few pairs most experts have become so unlikely that the exponential is 0.
      if (!any_not_below(below, ExpTable<Acc>::lowest)) continue;
      const Lanes<Acc> likelihood = exponential(below);
      total = total + likelihood;
      mixed = mixed + likelihood * load_whole(predictions + m);
    }
    store_whole(sum, total);
    store_whole(weighted, mixed);
  }
};

// One sequence's inputs, targets and sums.
template <class Acc>
struct Sequence {
  const Acc *x, *y;
  Acc *largest, *sums, *weighted;

  Online<Acc> online(int64_t pair) const { return {largest + pair, sums + pair * lanes, weighted + pair * lanes}; }
};

template <class Acc>
void partial_as(const StreamSoftmax& view, const StreamPartial& to, int64_t slot, int64_t chunk, int64_t begin, int64_t n, Acc* scratch) {
  const int64_t pairs = view.pairs, dims = view.dims, tile = stream_tile(dims);
  Acc *const weights = scratch, *const squares = weights + dims * tile, *const predictions = squares + tile;
  Acc *const scores = predictions + stream_pairs * tile, *const row = scores + stream_pairs * tile;
  Acc *const x = row + dims, *const y = x + n * pairs * dims, *const largest = y + n * pairs, *const sums = largest + n * pairs,
             *const weighted = sums + n * pairs * lanes;
  load_block(view.x.dtype, view.x.data, begin * pairs * dims, n * pairs * dims, x);
  load_block(view.y.dtype, view.y.data, begin * pairs, n * pairs, y);
  const auto sequence = [&](int64_t b) {
    const int64_t at = b * pairs;
    return Sequence<Acc>{x + at * dims, y + at, largest + at, sums + at * lanes, weighted + at * lanes};
  };
  for (int64_t b = 0; b < n; ++b) {
    for (int64_t k = 0; k < pairs; ++k) sequence(b).online(k).start();
  }
  const Acc scale = static_cast<Acc>(-0.5 / (view.sigma * view.sigma));
  const int64_t start = chunk * stream_chunk, stop = view.count - start < stream_chunk ? view.count : start + stream_chunk;
  for (int64_t first = start; first < stop; first += tile) {
    const int64_t count = stop - first < tile ? stop - first : tile, padded = in_whole_lanes(count);
    load_tile(view, first, count, tile, row, weights);
    for (int64_t b = 0; b < n; ++b) {
      const Sequence<Acc> one = sequence(b);
      start_squares(count, padded, squares);
      for (int64_t k = 0; k < pairs;) {
        Lanes<Acc> top[stream_pairs];
        const bool several = k + stream_pairs <= pairs;
        if (several) {
          predict<stream_pairs>(one.x, one.y, k, dims, weights, tile, padded, scale, squares, predictions, scores, top);
        } else {
          predict<1>(one.x, one.y, k, dims, weights, tile, padded, scale, squares, predictions, scores, top);
        }
        for (int64_t i = 0; i < (several ? stream_pairs : 1); ++i, ++k) {
          one.online(k).add(scores + i * tile, predictions + i * tile, padded, top[i]);
        }
      }
    }
  }
  for (int64_t i = 0; i < n * pairs; ++i) {
    const int64_t place = (slot * view.batch + begin) * pairs + i;
    static_cast<Acc*>(to.largest)[place] = largest[i];
    static_cast<Acc*>(to.sum)[place] = sum_of_lanes(load_whole(sums + i * lanes));
    static_cast<Acc*>(to.weighted)[place] = sum_of_lanes(load_whole(weighted + i * lanes));
  }
}

template <class Acc>
void fold_as(const StreamPartial& partial, bool starts, int64_t chunks, int64_t entries) {
  Acc *const tops = static_cast<Acc*>(partial.largest), *const sums = static_cast<Acc*>(partial.sum),
             *const mixes = static_cast<Acc*>(partial.weighted);
  for (int64_t i = 0; i < entries; ++i) {
    Acc largest = starts ? -bits_infinity<Acc>() : tops[i], sum = starts ? Acc{0} : sums[i], weighted = starts ? Acc{0} : mixes[i];
    for (int64_t at = i + entries; at <= i + chunks * entries; at += entries) {
      const Acc higher = tops[at] > largest ? tops[at] : largest, center = center_of(higher);
      const Acc before = exponential_of(largest - center), now = exponential_of(tops[at] - center);
      sum = before * sum + now * sums[at];
      weighted = before * weighted + now * mixes[at];
      largest = higher;
    }
    tops[i] = largest;
    sums[i] = sum;
    mixes[i] = weighted;
  }
}

template <class Acc>
void finish_as(const StreamPartial& partial, int64_t entries, Acc* pred, Acc* lse) {
  const Acc *const tops = static_cast<const Acc*>(partial.largest), *const sums = static_cast<const Acc*>(partial.sum),
                   *const mixes = static_cast<const Acc*>(partial.weighted);
  for (int64_t i = 0; i < entries; ++i) {
    pred[i] = mixes[i] / sums[i];
    lse[i] = center_of(tops[i]) + std::log(sums[i]);
  }
}

void partial(bool wide, const StreamSoftmax& view, const StreamPartial& to, int64_t slot, int64_t chunk, int64_t begin, int64_t n,
             void* scratch) {
  if (wide) {
    partial_as(view, to, slot, chunk, begin, n, static_cast<double*>(scratch));
  } else {
    partial_as(view, to, slot, chunk, begin, n, static_cast<float*>(scratch));
  }
}

void fold(bool wide, const StreamPartial& partial, bool starts, int64_t chunks, int64_t entries) {
  if (wide) {
    fold_as<double>(partial, starts, chunks, entries);
  } else {
    fold_as<float>(partial, starts, chunks, entries);
  }
}

void finish(bool wide, const StreamPartial& partial, int64_t entries, void* pred, void* lse) {
  if (wide) {
    finish_as(partial, entries, static_cast<double*>(pred), static_cast<double*>(lse));
  } else {
    finish_as(partial, entries, static_cast<float*>(pred), static_cast<float*>(lse));
  }
}

const StreamSoftmaxLoops table = {partial, fold, finish};

}  // namespace

TASKLOOM_EXPORT_LOOPS(StreamSoftmaxLoops, stream_softmax_loops, table)

}  // namespace taskloom
