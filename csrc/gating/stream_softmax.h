// stream_softmax_mix: a softmax gate over very many linear experts, in tiles of them. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

struct StreamSoftmax {
  Elements x, y, experts;  // [batch, pairs, dims], [batch, pairs], [experts, dims]
  int64_t batch, pairs, dims, count;
  double sigma;
};

// What chunks of the experts came to for each sequence and pair: the largest score, and sums of exp(score - largest) and of that times the
// expert's prediction. [slots, batch, pairs] each, in the dtype of the arithmetic.
struct StreamPartial {
  void *largest, *sum, *weighted;
};

// Experts of a chunk, whose sums are one partial. It depends on the sizes alone, and so do the results.
constexpr int64_t stream_chunk = 8192;
// Sequences that see a tile of experts one after the other.
constexpr int64_t stream_sequences = 8;
// Pairs that are predicted together.
constexpr int64_t stream_pairs = 4;

// Experts of a tile, a multiple of sixteen: their weights stay in the nearest cache.
inline int64_t stream_tile(int64_t dims) {
  constexpr int64_t cached = 4096, most = 512;
  const int64_t tile = cached / dims / 16 * 16;
  return tile < 16 ? 16 : tile > most ? most : tile;
}

// Accumulators of scratch.
inline int64_t stream_scratch(int64_t pairs, int64_t dims) {
  return (dims + 1 + 2 * stream_pairs) * stream_tile(dims) + dims + stream_sequences * (pairs * (dims + 1) + pairs * (2 * 16 + 1));
}

struct StreamSoftmaxLoops {
  // Experts of chunk `chunk` for sequences begin .. begin + n, at most stream_sequences, into a slot.
  void (*partial)(bool wide, const StreamSoftmax& view, const StreamPartial& to, int64_t slot, int64_t chunk, int64_t begin, int64_t n,
                  void* scratch);
  // Adds slots 1 .. 1 + chunks, in order, to what slot 0 holds; where `starts`, that is nothing yet.
  void (*fold)(bool wide, const StreamPartial& partial, bool starts, int64_t chunks, int64_t entries);
  // The predictions and logarithms of slot 0.
  void (*finish)(bool wide, const StreamPartial& partial, int64_t entries, void* pred, void* lse);
};

TASKLOOM_LOOPS(StreamSoftmaxLoops, stream_softmax_loops)

// The dtype of the arithmetic throughout, but for the experts' gradient.
struct StreamBackward {
  StreamSoftmax forward;
  const void *for_pred, *for_lse;  // [batch, pairs], or null
  const void *pred, *lse;          // [batch, pairs]
  void *for_x, *for_y;             // [parts, batch, pairs, dims], [parts, batch, pairs], or null
  void* for_experts;               // in the dtype of the experts, or null
};

// How the experts are split into parts, each of which adds up what it gives to x and y: by the sizes of the pool alone.
struct StreamParts {
  static constexpr int64_t most = 16, most_tile = 128;
  int64_t tile, size, count;

  StreamParts(int64_t experts, int64_t dims) : tile(stream_tile(dims) < most_tile ? stream_tile(dims) : most_tile) {
    const int64_t tiles = (experts + tile - 1) / tile, together = (tiles + most - 1) / most;
    size = together * tile;
    count = (experts + size - 1) / size;
  }

  // Accumulators of scratch.
  int64_t scratch(int64_t pairs, int64_t dims) const { return (2 * dims + 1 + 2 * pairs) * tile + dims + pairs * (dims + 1 + 16); }
};

struct StreamBackwardLoops {
  void (*part)(bool wide, const StreamBackward& view, const StreamParts& parts, int64_t part, void* scratch);
};

TASKLOOM_LOOPS(StreamBackwardLoops, stream_softmax_backward_loops)

}  // namespace taskloom
