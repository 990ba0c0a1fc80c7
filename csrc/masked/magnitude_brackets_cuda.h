// The sample of a search for ranks of magnitudes, and the bracket that it gives for each rank.
#pragma once

#include "masked/magnitude_search_cuda.h"

namespace taskloom {
namespace {

constexpr int sample_threads = 1024;
template <bool wide>
constexpr int64_t sample_groups = thread_groups<wide> * sample_threads;
template <bool wide>
constexpr int64_t sample_entries = sample_groups<wide> * vector_entries;

// Half the width of a bracket, in entries of the sample.
__host__ __device__ inline float bracket_margin(float size, float share) { return 6.0f * sqrtf(size * share * (1.0f - share)) + 16.0f; }

__device__ inline uint32_t scattered(uint32_t value) {
  value = (value ^ (value >> 16)) * 0x7feb352du;
  value = (value ^ (value >> 15)) * 0x846ca68bu;
  return value ^ (value >> 16);
}

// Draws the sample of each vector: groups at jittered places, one in each of equal stretches, or the whole vector where it is no larger. A
// block for `sample_threads` groups of a vector.
template <bool wide>
__global__ void __launch_bounds__(sample_threads) draw_kernel(SearchTables tables) {
  constexpr int parts = thread_groups<wide>;
  const int64_t place = blockIdx.x / parts, run = blockIdx.x % parts * int64_t{sample_threads} + threadIdx.x;
  const SearchVector& vector = tables.vectors[place];
  int64_t group = run;
  if (vector.groups > sample_groups<wide>) {
    group = run * vector.groups / sample_groups<wide>;
    group += scattered(static_cast<uint32_t>(run)) % ((run + 1) * vector.groups / sample_groups<wide> - group);
  }
  MagnitudeBits<wide> bits[vector_entries];
  if (group < vector.groups) {
    const SearchSegment* const own = tables.segments + vector.first_segment;
    const SearchSegment& segment = own[row_at(own, vector.segments, &SearchSegment::first_group, group)];
    load_magnitudes<wide>(segment.delta, (group - segment.first_group) * vector_entries, segment.numel, bits);
  } else {
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) bits[i] = no_magnitude;
  }
  auto* const to = static_cast<MagnitudeBits<wide>*>(tables.samples) + place * sample_entries<wide>;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) to[i * sample_groups<wide> + run] = bits[i];
}

// A block for each search: its bracket, or the rank itself where the sample is the whole vector. Clears what later kernels add to.
template <bool wide>
__global__ void __launch_bounds__(sample_threads) bracket_kernel(SearchTables tables) {
  constexpr int groups = thread_groups<wide>;
  constexpr int64_t most = wide ? INT64_MAX : INT32_MAX;
  TASKLOOM_SHARED(uint32_t, histogram, digit_bins);
  TASKLOOM_SHARED(BlockWords, words, 1);
  const int64_t search = blockIdx.x;
  const SearchRequest request = tables.requests[search];
  const SearchVector& vector = tables.vectors[request.vector];
  SearchState& state = tables.states[search];
  for (int bin = threadIdx.x; bin < digit_passes<wide> * digit_bins; bin += sample_threads) histogram_of<wide>(tables, search, 0)[bin] = 0;
  if (threadIdx.x == 0) {
    state.above = state.at_high = state.between = state.at_low = 0;
    state.known = 0;
  }
  if (request.rank <= 0 || request.rank > vector.numel) {
    // Above rank 0 lies nothing; beyond the last one lies everything.
    if (threadIdx.x == 0) {
      const bool all = request.rank > 0;
      state.known = 1;
      state.sampled = {all ? 0 : most, most, all, all, 0, Place::data};
    }
    return;
  }
  MagnitudeBits<wide> bits[groups][vector_entries];
  int64_t size = 0;
  const auto* const from = static_cast<const MagnitudeBits<wide>*>(tables.samples) + request.vector * sample_entries<wide> + threadIdx.x;
#pragma unroll
  for (int slot = 0; slot < groups * vector_entries; ++slot) {
    bits[slot / vector_entries][slot % vector_entries] = from[slot * sample_threads];
  }
#pragma unroll
  for (int slot = 0; slot < groups * vector_entries; ++slot) {
    size += bits[slot / vector_entries][slot % vector_entries] != no_magnitude ? 1 : 0;
  }
  size = block_scan<sample_threads>(size, words);
  if (threadIdx.x == sample_threads - 1) words->count = size;
  __syncthreads();
  size = words->count;
  const bool whole = vector.groups <= sample_groups<wide>;
  const float share = static_cast<float>(static_cast<double>(request.rank) / static_cast<double>(vector.numel));
  const float center = static_cast<float>(size) * share;
  const float margin = bracket_margin(static_cast<float>(size), share);
  // Near an end of the sample the end of the range is the safe bound.
  const int64_t upper = whole ? request.rank : static_cast<int64_t>(center - margin);
  const int64_t lower = static_cast<int64_t>(center + margin) + 1;
  int64_t low = 0, high = most;
  for (int end = 0; end < (whole ? 1 : 2); ++end) {
    const int64_t rank = end == 0 ? upper : lower;
    if (rank < 1 || rank > size) continue;
    const Selected selected = block_select<wide, groups, sample_threads>(bits, rank, histogram, words);
    if (whole && threadIdx.x == 0) {
      state.known = 1;
      state.sampled = {selected.bits, selected.bits, selected.kept, selected.equal, 0, Place::data};
    }
    if (end == 0) high = selected.bits;
    if (end == 1) low = selected.bits;
  }
  if (threadIdx.x == 0) {
    state.low = low;
    state.high = high;
  }
}

}  // namespace
}  // namespace taskloom
