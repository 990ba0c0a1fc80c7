// The search for ranks of magnitudes as its kernels share it: what is looked for, how far it has come, and the loads.
#pragma once

#include "common/cuda_launch.h"
#include "masked/magnitude_ranks_cuda.h"
#include "masked/magnitude_select_cuda.h"

namespace taskloom {

// Groups of 8 entries that a block of cuda_threads holds in registers at once: a chunk.
template <bool wide>
constexpr int thread_groups = wide ? 2 : 4;
template <bool wide>
constexpr int64_t chunk_groups = thread_groups<wide> * cuda_threads;
template <bool wide>
constexpr int64_t chunk_entries = chunk_groups<wide> * vector_entries;

// The digits of a magnitude's bits, and with them the most passes over the entries between a bracket.
template <bool wide>
constexpr int digit_passes = ((wide ? 63 : 31) + digit_bits - 1) / digit_bits;

// One tensor of a vector; no chunk lies in two.
struct SearchSegment {
  DeviceDelta delta;
  int64_t numel;
  int64_t first_group;  // in its vector
  int64_t first_chunk;  // of all
  int64_t vector;
};

struct SearchVector {
  int64_t first_segment, segments;
  int64_t groups, numel;
  int64_t first_chunk, chunks;
  int64_t first_search, searches;
};

struct SearchRequest {
  int64_t vector, rank;
  int64_t first_candidate, capacity;
  int64_t first_entry;  // of its chunks, in the tables of chunks
};

// Where the magnitude that is looked for lies: among the collected candidates, or anywhere; or it is an end of the bracket.
enum class Place : int32_t { candidates, data, at_high, at_low };

// It is the left-th largest among the entries of `place` with magnitudes first .. last, of which it shares all but the lowest `width` bits
// with `first`. It is found, and is `first`, where width is 0; then `equal` entries equal it.
struct SearchStep {
  int64_t first, last, left, equal;
  int32_t width;
  Place place;
};

struct SearchState {
  int64_t known;  // whether `sampled` is the result: the sample was all there is, or the rank asks for nothing or for all
  SearchStep sampled;
  int64_t low, high;
  unsigned long long above, at_high, between, at_low;
  SearchStep steps[digit_passes<true>];
  SearchStep found;
};

// What a chunk holds of one search's bracket; its candidates stand together from `first` on.
struct ChunkEntry {
  int64_t first;
  uint16_t between, at_high, at_low, unused;
};

// All tables of a search, in device memory.
struct SearchTables {
  const SearchSegment* segments;
  const SearchVector* vectors;
  const SearchRequest* requests;
  SearchState* states;
  void* samples;                   // [vectors, entries of a sample], no_magnitude where there are fewer
  unsigned long long* histograms;  // [searches, digit_passes, digit_bins]
  void* candidates;
  ChunkEntry* entries;  // null where no ties are located
  uint32_t* equal;      // per chunk
  int64_t segment_count, searches, chunks;
};

template <bool wide>
__device__ inline unsigned long long* histogram_of(const SearchTables& tables, int64_t search, int pass) {
  return tables.histograms + (search * digit_passes<wide> + pass) * digit_bins;
}

__device__ inline bool needs_ties(const SearchStep& found) { return found.left > 0 && found.left < found.equal; }

__device__ inline int bit_width(int64_t value) { return 64 - __clzll(value); }

// What follows from the counts around the bracket. Where it missed, everything is looked through; where more lies between than there
// was room for, all entries are looked through for what lies between.
template <bool wide>
__device__ inline SearchStep step_of_bracket(const SearchState& state, const SearchRequest& request) {
  if (state.known) return state.sampled;
  const int64_t at_high = static_cast<int64_t>(state.at_high), between = static_cast<int64_t>(state.between);
  const int64_t at_low = static_cast<int64_t>(state.at_low);
  constexpr int64_t most = wide ? INT64_MAX : INT32_MAX;
  int64_t left = request.rank - static_cast<int64_t>(state.above);
  const SearchStep anew{0, most, request.rank, 0, wide ? 63 : 31, Place::data};
  if (left <= 0) return anew;
  if (left <= at_high) return {state.high, state.high, left, at_high, 0, Place::at_high};
  left -= at_high;
  if (left <= between) {
    const int64_t first = state.low + 1, last = state.high - 1;
    return {first, last, left, between, bit_width(last - first), between <= request.capacity ? Place::candidates : Place::data};
  }
  left -= between;
  if (left <= at_low) return {state.low, state.low, left, at_low, 0, Place::at_low};
  return anew;
}

// The state of one search before `pass`. All threads of the block call it.
template <bool wide>
__device__ inline SearchStep step_before(const SearchTables& tables, int64_t search, int pass, BlockWords* words) {
  if (pass == 0) return step_of_bracket<wide>(tables.states[search], tables.requests[search]);
  SearchStep step = tables.states[search].steps[pass - 1];
  if (step.width == 0) return step;
  const FoundDigit found = find_digit<cuda_threads>(histogram_of<wide>(tables, search, pass - 1), step.left, words);
  const int shift = step.width - min(digit_bits, step.width);
  step.first += found.digit << shift;
  const int64_t end = step.first + ((int64_t{1} << shift) - 1);
  step.last = end < step.last ? end : step.last;
  step.left -= found.above;
  step.equal = found.count;
  step.width = shift;
  return step;
}

// The last of `count` ascending rows whose `start` is at most `place`.
template <class Row>
__device__ inline int64_t row_at(const Row* rows, int64_t count, int64_t Row::* start, int64_t place) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (rows[middle].*start <= place) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The magnitudes of a whole chunk that starts at `first`, thread by thread in groups that lie cuda_threads groups apart; no_magnitude
// at `numel` and beyond. The dtype is looked at once a chunk, so that all its loads are on the way together.
template <bool wide>
__device__ inline void load_chunk(const DeviceDelta& delta, int64_t first, int64_t numel,
                                  MagnitudeBits<wide> (&bits)[thread_groups<wide>][vector_entries]) {
  const int64_t own = first + vector_entries * static_cast<int64_t>(threadIdx.x);
  constexpr int64_t apart = vector_entries * cuda_threads;
  const bool has_base = delta.base.data != nullptr;
  const bool like = !has_base || (delta.base.dtype == delta.tuned.dtype && delta.base.aligned);
  if (!like || !delta.tuned.aligned || first + chunk_entries<wide> > numel) {
    load_groups(bits, [&](int group, auto& loaded) { load_magnitudes<wide>(delta, own + group * apart, numel, loaded); });
    return;
  }
  const MagnitudeBits<wide> most = most_magnitude<wide>(delta);
  with_storage(delta.tuned.dtype, [&](auto storage) {
    if constexpr (wide || decltype(storage)::entry_bytes < 8) {
      constexpr int together = decltype(storage)::entry_bytes == 2 ? 2 : 1;
#pragma unroll
      for (int begin = 0; begin < thread_groups<wide>; begin += together) {
        uint32_t tuned[together][storage.words], base[together][storage.words];
#pragma unroll
        for (int group = 0; group < together; ++group) storage.read(delta.tuned.data, own + (begin + group) * apart, tuned[group]);
        if (has_base) {
#pragma unroll
          for (int group = 0; group < together; ++group) storage.read(delta.base.data, own + (begin + group) * apart, base[group]);
        }
#pragma unroll
        for (int group = 0; group < together; ++group) {
          MagnitudeValue<wide> values[vector_entries], origin[vector_entries];
          storage.unpack(tuned[group], values);
          if (has_base) {
            storage.unpack(base[group], origin);
#pragma unroll
            for (int i = 0; i < vector_entries; ++i) values[i] -= origin[i];
          }
#pragma unroll
          for (int i = 0; i < vector_entries; ++i) bits[begin + group][i] = magnitude_bits(values[i], most);
        }
      }
    }
  });
}

// Calls body(magnitudes) for each of the thread's groups of a chunk.
template <bool wide, class Body>
__device__ inline void for_chunk(const SearchSegment& segment, int64_t chunk, const Body& body) {
  const int64_t end = segment.numel;
  int64_t begin = (chunk - segment.first_chunk) * chunk_entries<wide> + vector_entries * static_cast<int64_t>(threadIdx.x);
#pragma unroll 1
  for (int group = 0; group < thread_groups<wide>; ++group, begin += vector_entries * cuda_threads) {
    MagnitudeBits<wide> bits[vector_entries];
    load_magnitudes<wide>(segment.delta, begin, end, bits);
    body(bits);
  }
}

}  // namespace taskloom
