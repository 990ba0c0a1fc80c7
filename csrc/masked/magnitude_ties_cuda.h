// Where the last kept entry of those that equal a found magnitude lies: counts per chunk, a scan over them, and a look into one chunk.
#pragma once

#include "masked/magnitude_query_cuda.h"
#include "masked/magnitude_search_cuda.h"

namespace taskloom {
namespace {

// A block of so many threads holds a chunk, a group each.
constexpr int tie_threads = 1024;

// How many entries of each chunk equal what was found, where ties have to be located.
template <bool wide>
__global__ void __launch_bounds__(cuda_threads, 4) equal_kernel(SearchTables tables, int64_t per_search) {
  using Bits = MagnitudeBits<wide>;
  const int64_t search = blockIdx.x / per_search, part = blockIdx.x % per_search;
  const SearchStep found = tables.states[search].found;
  if (!needs_ties(found)) return;
  const SearchRequest& request = tables.requests[search];
  const SearchVector& vector = tables.vectors[request.vector];
  const Bits bits = static_cast<Bits>(found.first);
  uint32_t* const equal = tables.equal + request.first_entry;
  if (found.place != Place::data) {
    constexpr int warps = cuda_threads / warp_size;
    const int lane = threadIdx.x % warp_size;
    for (int64_t chunk = part * warps + threadIdx.x / warp_size; chunk < vector.chunks; chunk += per_search * warps) {
      const ChunkEntry entry = tables.entries[request.first_entry + chunk];
      uint32_t count = found.place == Place::at_high ? entry.at_high : found.place == Place::at_low ? entry.at_low : 0;
      if (found.place == Place::candidates) {
        const Bits* const candidates = static_cast<const Bits*>(tables.candidates) + request.first_candidate + entry.first;
        for (int i = lane; i < entry.between; i += warp_size) count += candidates[i] == bits ? 1u : 0u;
        count = __reduce_add_sync(whole_warp, count);
      }
      if (lane == 0) equal[chunk] = count;
    }
    return;
  }
  TASKLOOM_SHARED(uint32_t, sums, cuda_threads / warp_size);
  const SearchSegment& segment = tables.segments[vector.first_segment];
  for (int64_t chunk = part; chunk < vector.chunks; chunk += per_search) {
    uint32_t count = 0;
    for_chunk<wide>(segment, segment.first_chunk + chunk, [&](const Bits(&values)[vector_entries]) {
#pragma unroll
      for (int entry = 0; entry < vector_entries; ++entry) count += values[entry] == bits ? 1u : 0u;
    });
    count = __reduce_add_sync(whole_warp, count);
    if (threadIdx.x % warp_size == 0) sums[threadIdx.x / warp_size] = count;
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t sum = 0;
      for (int i = 0; i < cuda_threads / warp_size; ++i) sum += sums[i];
      equal[chunk] = sum;
    }
    __syncthreads();
  }
}

// A block for each search: the chunk with its last kept entry by a scan, and the entry in it.
template <bool wide>
__global__ void __launch_bounds__(tie_threads) tie_kernel(SearchTables tables, SearchOutputs outputs) {
  using Bits = MagnitudeBits<wide>;
  TASKLOOM_SHARED(BlockWords, words, 1);
  const int64_t search = blockIdx.x;
  const SearchStep found = tables.states[search].found;
  if (!needs_ties(found)) return;
  const SearchRequest& request = tables.requests[search];
  const SearchVector& vector = tables.vectors[request.vector];
  const uint32_t* const equal = tables.equal + request.first_entry;
  int64_t before = 0, chunk = -1, left = 0;
  for (int64_t first = 0; first < vector.chunks && chunk < 0; first += tie_threads) {
    const int64_t own = first + threadIdx.x;
    const int64_t count = own < vector.chunks ? equal[own] : 0;
    const int64_t until = before + block_scan<tie_threads>(count, words);
    if (threadIdx.x == 0) words->digit = -1;
    __syncthreads();
    if (until - count < found.left && found.left <= until) {
      words->digit = own;
      words->above = until - count;
    }
    if (threadIdx.x == tie_threads - 1) words->count = until;
    __syncthreads();
    chunk = words->digit;
    left = found.left - words->above;
    before = words->count;
    __syncthreads();
  }
  // More are kept than there are: all of them, as is written already.
  if (chunk < 0) return;
  const SearchSegment& segment = tables.segments[vector.first_segment];
  const int64_t begin = chunk * chunk_entries<wide> + vector_entries * static_cast<int64_t>(threadIdx.x);
  Bits bits[vector_entries];
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) bits[i] = no_magnitude;
  if (threadIdx.x < chunk_groups<wide>) load_magnitudes<wide>(segment.delta, begin, segment.numel, bits);
  int64_t count = 0;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) count += static_cast<int64_t>(bits[i]) == found.first ? 1 : 0;
  int64_t seen = block_scan<tie_threads>(count, words) - count;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    if (static_cast<int64_t>(bits[i]) != found.first) continue;
    ++seen;
    if (seen == left) outputs.cuts[outputs.first + search].tie_end = begin + i + 1;
  }
}

}  // namespace
}  // namespace taskloom
