// The search for ranks of magnitudes over whole tensors, any number of them at once.
//
// A sample of each vector (32768 entries) says between which two magnitudes a rank's threshold lies, to six standard deviations. One pass
// over the data counts what lies above the bracket and at its ends, and collects what lies between: 3.4 % of the entries or less. The
// threshold among these is found by histograms of 11-bit digits, two passes over them as a rule. So it moves n * (bytes of tuned and base)
// and 14 % of 4 n at most, in 8 launches whatever the number of vectors and ranks (10 where ties are located). Reckoned for an H100, not
// measured: 90 us to read 64 Mi float32 entries (256 MiB), 12 us for the candidates and 20 us of launches and of the sample are 70 % of
// the copy's bandwidth, more where tensors are larger; bfloat16 without a base is bound by some 12 integer operations an entry.
//
// Exactness does not rest on the sample: the kernels of the digits look at the counts, and where the bracket missed (or more lies between
// than there is room for, as with few distinct magnitudes near the threshold) they read the data itself, up to three passes more; nothing
// waits for the device to decide it. Magnitudes equal to an end of the bracket are counted, not collected, so that many zeros or one
// repeated magnitude cost nothing.
//
// Ties go to the lowest index: chunks of 8192 entries know where their candidates stand, so the equal ones are counted per chunk from the
// candidates, a block finds the chunk by a scan over these counts, and then the entry in that chunk. Where all equal entries are kept, as
// with most float32 data, the last two kernels return at once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/cuda_table.h"
#include "masked/magnitude_brackets_cuda.h"
#include "masked/magnitude_query_cuda.h"
#include "masked/magnitude_ranks_cuda.h"
#include "masked/magnitude_search_cuda.h"
#include "masked/magnitude_ties_cuda.h"

namespace taskloom {
namespace {

// Ranks of one vector that are looked for in one pass over it.
constexpr size_t ranks_together = 8;
// Bytes of candidates of the vectors that are looked through together; one vector's may be more.
constexpr int64_t candidate_room = int64_t{256} << 20;

// Blocks of the pass over the data that a multiprocessor holds at once, for their registers.
constexpr int count_blocks = 3;

__device__ inline bool any_unknown(const SearchTables& tables, const SearchVector& vector) {
  for (int64_t i = 0; i < vector.searches; ++i) {
    if (!tables.states[vector.first_search + i].known) return true;
  }
  return false;
}

struct WarpCounts {
  uint32_t above_high, low_between;  // two counts each, the second in the upper half
};

// Counts around the bracket of one search and collects what lies between, for a chunk whose magnitudes the block holds.
template <bool wide>
__device__ inline void count_around(const SearchTables& tables, int64_t search, int64_t chunk_in_vector,
                                    const MagnitudeBits<wide> (&bits)[thread_groups<wide>][vector_entries], WarpCounts* warps,
                                    int64_t* reserved) {
  using Bits = MagnitudeBits<wide>;
  using Word = std::make_unsigned_t<Bits>;
  SearchState& state = tables.states[search];
  const Bits low = static_cast<Bits>(state.low), high = static_cast<Bits>(state.high);
  const Word span = static_cast<Word>(high) - static_cast<Word>(low);
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  uint32_t above = 0, between = 0, at_high = 0, at_low = 0;
#pragma unroll
  for (int slot = 0; slot < thread_groups<wide> * vector_entries; ++slot) {
    const Bits value = bits[slot / vector_entries][slot % vector_entries];
    above += value > high ? 1u : 0u;
    if (static_cast<Word>(value) - static_cast<Word>(low) <= span) between |= 1u << slot;
  }
  if (between != 0) {
#pragma unroll
    for (int slot = 0; slot < thread_groups<wide> * vector_entries; ++slot) {
      const Bits value = bits[slot / vector_entries][slot % vector_entries];
      if (between >> slot & 1u) {
        if (value == high) {
          ++at_high;
          between &= ~(1u << slot);
        } else if (value == low) {
          ++at_low;
          between &= ~(1u << slot);
        }
      }
    }
  }
  const uint32_t above_high = __reduce_add_sync(whole_warp, above | at_high << 16);
  uint32_t low_between = at_low | static_cast<uint32_t>(__popc(between)) << 16;
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const uint32_t other = __shfl_up_sync(whole_warp, low_between, step);
    if (lane >= step) low_between += other;
  }
  if (lane == warp_size - 1) warps[warp] = {above_high, low_between};
  __syncthreads();
  uint32_t all_above_high = 0, all_low_between = 0, before = low_between;
#pragma unroll
  for (int i = 0; i < cuda_threads / warp_size; ++i) {
    const WarpCounts counts = warps[i];
    if (i < warp) before += counts.low_between;
    all_above_high += counts.above_high;
    all_low_between += counts.low_between;
  }
  const SearchRequest& request = tables.requests[search];
  if (threadIdx.x == 0) {
    const unsigned long long chunk_between = all_low_between >> 16;
    if (all_above_high & 0xffffu) atomicAdd(&state.above, static_cast<unsigned long long>(all_above_high & 0xffffu));
    if (all_above_high >> 16) atomicAdd(&state.at_high, static_cast<unsigned long long>(all_above_high >> 16));
    if (all_low_between & 0xffffu) atomicAdd(&state.at_low, static_cast<unsigned long long>(all_low_between & 0xffffu));
    *reserved = chunk_between == 0 ? 0 : static_cast<int64_t>(atomicAdd(&state.between, chunk_between));
    if (tables.entries != nullptr) {
      tables.entries[request.first_entry + chunk_in_vector] = {*reserved, static_cast<uint16_t>(chunk_between),
                                                               static_cast<uint16_t>(all_above_high >> 16),
                                                               static_cast<uint16_t>(all_low_between & 0xffffu), 0};
    }
  }
  __syncthreads();
  if (between == 0 || *reserved + (all_low_between >> 16) > request.capacity) return;
  Bits* to = static_cast<Bits*>(tables.candidates) + request.first_candidate + *reserved + ((before >> 16) - __popc(between));
#pragma unroll
  for (int slot = 0; slot < thread_groups<wide> * vector_entries; ++slot) {
    if (between >> slot & 1u) *to++ = bits[slot / vector_entries][slot % vector_entries];
  }
}

template <bool wide>
__global__ void __launch_bounds__(cuda_threads, count_blocks) count_kernel(SearchTables tables) {
  TASKLOOM_SHARED(WarpCounts, warps, cuda_threads / warp_size);
  TASKLOOM_SHARED(int64_t, reserved, 1);
  for (int64_t chunk = blockIdx.x; chunk < tables.chunks; chunk += gridDim.x) {
    const SearchSegment& segment = tables.segments[row_at(tables.segments, tables.segment_count, &SearchSegment::first_chunk, chunk)];
    const SearchVector& vector = tables.vectors[segment.vector];
    if (!any_unknown(tables, vector)) continue;
    MagnitudeBits<wide> bits[thread_groups<wide>][vector_entries];
    load_chunk<wide>(segment.delta, (chunk - segment.first_chunk) * chunk_entries<wide>, segment.numel, bits);
    for (int64_t i = 0; i < vector.searches; ++i) {
      const int64_t search = vector.first_search + i;
      if (tables.states[search].known) continue;
      count_around<wide>(tables, search, chunk - vector.first_chunk, bits, warps, reserved);
    }
  }
}

// One digit: `per_search` blocks count it for each search, among the candidates or in the data.
template <bool wide>
__global__ void __launch_bounds__(cuda_threads, 4) digit_kernel(SearchTables tables, int pass, int64_t per_search) {
  using Bits = MagnitudeBits<wide>;
  using Word = std::make_unsigned_t<Bits>;
  TASKLOOM_SHARED(uint32_t, histogram, digit_bins);
  TASKLOOM_SHARED(BlockWords, words, 1);
  const int64_t search = blockIdx.x / per_search, part = blockIdx.x % per_search;
  const SearchStep step = step_before<wide>(tables, search, pass, words);
  if (part == 0 && threadIdx.x == 0) tables.states[search].steps[pass] = step;
  if (step.width == 0) return;
  for (int bin = threadIdx.x; bin < digit_bins; bin += cuda_threads) histogram[bin] = 0;
  __syncthreads();
  const int shift = step.width - min(digit_bits, step.width);
  const Word first = static_cast<Word>(step.first), span = static_cast<Word>(step.last - step.first);
  auto count = [&](Bits value) {
    const Word distance = static_cast<Word>(value) - first;
    if (distance <= span) atomicAdd(&histogram[distance >> shift], 1u);
  };
  const SearchRequest& request = tables.requests[search];
  if (step.place == Place::candidates) {
    const Bits* const candidates = static_cast<const Bits*>(tables.candidates) + request.first_candidate;
    const int64_t end = static_cast<int64_t>(tables.states[search].between);
    const int64_t stride = per_search * cuda_threads;
#pragma unroll 4
    for (int64_t i = part * cuda_threads + threadIdx.x; i < end; i += stride) count(candidates[i]);
  } else {
    const SearchVector& vector = tables.vectors[request.vector];
    for (int64_t i = part; i < vector.chunks; i += per_search) {
      const int64_t chunk = vector.first_chunk + i;
      const SearchSegment* const own = tables.segments + vector.first_segment;
      const SearchSegment& segment = own[row_at(own, vector.segments, &SearchSegment::first_chunk, chunk)];
      for_chunk<wide>(segment, chunk, [&](const Bits(&bits)[vector_entries]) {
#pragma unroll
        for (int entry = 0; entry < vector_entries; ++entry) count(bits[entry]);
      });
    }
  }
  __syncthreads();
  unsigned long long* const total = histogram_of<wide>(tables, search, pass);
  for (int bin = threadIdx.x; bin < digit_bins; bin += cuda_threads) {
    if (histogram[bin] != 0) atomicAdd(&total[bin], static_cast<unsigned long long>(histogram[bin]));
  }
}

__device__ inline void store_found(const SearchTables& tables, const SearchOutputs& outputs, int64_t search, bool wide,
                                   const SearchStep& found) {
  const int64_t place = outputs.first + search;
  tables.states[search].found = found;
  if (outputs.cuts != nullptr) {
    // Where ties have to be located, a later kernel writes the end.
    outputs.cuts[place] = {found.first, found.left <= 0 ? 0 : INT64_MAX};
  }
  if (outputs.kept != nullptr) {
    outputs.kept[place] = found.left;
    if (wide) {
      static_cast<int64_t*>(outputs.thresholds)[place] = found.first;
    } else {
      static_cast<int32_t*>(outputs.thresholds)[place] = static_cast<int32_t>(found.first);
    }
  }
}

template <bool wide>
__global__ void __launch_bounds__(cuda_threads) found_kernel(SearchTables tables, int passes, SearchOutputs outputs) {
  TASKLOOM_SHARED(BlockWords, words, 1);
  const SearchStep found = step_before<wide>(tables, blockIdx.x, passes, words);
  if (threadIdx.x == 0) store_found(tables, outputs, blockIdx.x, wide, found);
}

// Takes thresholds found elsewhere for found; how many entries equal them is not known.
__global__ void __launch_bounds__(cuda_threads) given_kernel(SearchTables tables, GivenThresholds given, bool wide, SearchOutputs outputs) {
  for (int64_t search = grid_index(); search < tables.searches; search += grid_stride()) {
    int64_t bits = 0;
    if (wide) {
      const double value = given.dtype == DType::f64 ? static_cast<const double*>(given.thresholds)[search]
                                                     : static_cast<double>(static_cast<const float*>(given.thresholds)[search]);
      bits = static_cast<int64_t>(__double_as_longlong(value)) & INT64_MAX;
    } else {
      bits = static_cast<const int32_t*>(given.thresholds)[search] & INT32_MAX;
    }
    store_found(tables, outputs, search, wide, {bits, bits, given.kept[search], INT64_MAX, 0, Place::data});
  }
}

// Tables on the host, for the vectors of one round.
struct SearchPlan {
  std::vector<SearchSegment> segments;
  std::vector<SearchVector> vectors;
  std::vector<SearchRequest> requests;
  int64_t chunks = 0, entries = 0, candidates = 0, most_chunks = 0;
  bool all_known = true;
};

template <bool wide>
bool known_from_sample(int64_t groups, int64_t numel, int64_t rank) {
  return rank <= 0 || rank > numel || groups <= sample_groups<wide>;
}

int64_t groups_of(const RankQuery& query) {
  int64_t groups = 0;
  for (const QuerySegment& segment : query.segments) groups += (segment.numel + vector_entries - 1) / vector_entries;
  return groups;
}

// Candidates that a search has room for: twice as many as the width of its bracket makes likely.
template <bool wide>
int64_t capacity_of(int64_t groups, int64_t numel, int64_t rank) {
  if (known_from_sample<wide>(groups, numel, rank)) return 0;
  constexpr auto sample = static_cast<float>(sample_entries<wide>);
  const float share = static_cast<float>(static_cast<double>(rank) / static_cast<double>(numel));
  const double expected = 2.0 * bracket_margin(sample, share) / sample * static_cast<double>(numel);
  return std::min(numel, 2 * static_cast<int64_t>(expected) + 1024);
}

template <bool wide>
int64_t capacity_of(const RankQuery& query) {
  const int64_t groups = groups_of(query);
  int64_t capacity = 0;
  for (const int64_t rank : query.ranks) capacity += capacity_of<wide>(groups, query.numel, rank);
  return capacity;
}

// Bytes that a vector's sample, candidates and histograms take.
template <bool wide>
int64_t memory_of(const RankQuery& query) {
  const auto searches = static_cast<int64_t>(query.ranks.size());
  return (capacity_of<wide>(query) + sample_entries<wide>)*(wide ? 8 : 4) + searches * digit_passes<wide> * digit_bins * 8;
}

template <bool wide>
void add_to(SearchPlan* plan, const RankQuery& query) {
  SearchVector vector{};
  vector.first_segment = static_cast<int64_t>(plan->segments.size());
  vector.first_chunk = plan->chunks;
  vector.first_search = static_cast<int64_t>(plan->requests.size());
  vector.numel = query.numel;
  for (const QuerySegment& segment : query.segments) {
    if (segment.numel == 0) continue;
    plan->segments.push_back({segment.delta, segment.numel, vector.groups, plan->chunks, static_cast<int64_t>(plan->vectors.size())});
    vector.groups += (segment.numel + vector_entries - 1) / vector_entries;
    plan->chunks += (segment.numel + chunk_entries<wide> - 1) / chunk_entries<wide>;
    ++vector.segments;
  }
  vector.chunks = plan->chunks - vector.first_chunk;
  vector.searches = static_cast<int64_t>(query.ranks.size());
  for (const int64_t rank : query.ranks) {
    const int64_t capacity = capacity_of<wide>(vector.groups, query.numel, rank);
    plan->requests.push_back({static_cast<int64_t>(plan->vectors.size()), rank, plan->candidates, capacity, plan->entries});
    plan->candidates += capacity;
    plan->entries += vector.chunks;
    plan->all_known = plan->all_known && known_from_sample<wide>(vector.groups, query.numel, rank);
  }
  plan->most_chunks = std::max(plan->most_chunks, vector.chunks);
  plan->vectors.push_back(vector);
}

Tensor scratch(const Tensor& where, int64_t bytes) { return torch::stable::new_empty(where, {bytes}, ScalarType::Byte); }

// Puts rows behind others of a table in device memory; where they begin, in words.
template <class Row>
size_t append(const std::vector<Row>& rows, std::vector<uint64_t>* words) {
  static_assert(std::is_trivially_copyable_v<Row> && sizeof(Row) % 8 == 0);
  const size_t begin = words->size();
  words->resize(begin + rows.size() * sizeof(Row) / 8);
  if (!rows.empty()) std::memcpy(words->data() + begin, rows.data(), rows.size() * sizeof(Row));
  return begin;
}

// Blocks for `items`, no more than run at once where a multiprocessor holds `held`.
int64_t resident_of(const Tensor& where, int64_t held, int64_t items) {
  return std::min(items, striding_blocks(where, INT32_MAX, 1) / resident_blocks * held);
}

// Looks for the ranks of a plan, or takes `given` for found, and writes the outputs.
template <bool wide>
void run(const Tensor& where, const SearchPlan& plan, const GivenThresholds* given, const SearchOutputs& outputs) {
  const auto searches = static_cast<int64_t>(plan.requests.size());
  if (searches == 0) return;
  const bool ties = outputs.cuts != nullptr, passes = given == nullptr && !plan.all_known;
  std::vector<uint64_t> rows;
  const size_t segments = append(plan.segments, &rows), vectors = append(plan.vectors, &rows), requests = append(plan.requests, &rows);
  const Tensor table = device_table(where, rows);
  const Tensor samples =
      scratch(where, given != nullptr ? 0 : static_cast<int64_t>(plan.vectors.size()) * sample_entries<wide> * (wide ? 8 : 4));
  const Tensor states = scratch(where, searches * static_cast<int64_t>(sizeof(SearchState)));
  const Tensor histograms = scratch(where, given != nullptr ? 0 : searches * digit_passes<wide> * digit_bins * 8);
  const Tensor candidates = scratch(where, passes ? plan.candidates * (wide ? 8 : 4) : 0);
  const Tensor entries = scratch(where, passes && ties ? plan.entries * static_cast<int64_t>(sizeof(ChunkEntry)) : 0);
  const Tensor equal = scratch(where, ties ? plan.entries * 4 : 0);
  SearchTables tables{};
  const uint64_t* const words = rows_of<uint64_t>(table);
  tables.segments = reinterpret_cast<const SearchSegment*>(words + segments);
  tables.vectors = reinterpret_cast<const SearchVector*>(words + vectors);
  tables.requests = reinterpret_cast<const SearchRequest*>(words + requests);
  tables.samples = samples.mutable_data_ptr();
  tables.states = static_cast<SearchState*>(states.mutable_data_ptr());
  tables.histograms = static_cast<unsigned long long*>(histograms.mutable_data_ptr());
  tables.candidates = candidates.mutable_data_ptr();
  tables.entries = passes && ties ? static_cast<ChunkEntry*>(entries.mutable_data_ptr()) : nullptr;
  tables.equal = static_cast<uint32_t*>(equal.mutable_data_ptr());
  tables.segment_count = static_cast<int64_t>(plan.segments.size());
  tables.searches = searches;
  tables.chunks = plan.chunks;
  const Launch each{dim3(static_cast<unsigned>(searches))};
  // As many blocks for each search as there is work for, and together about as many as the device runs at once.
  const int64_t per_search = std::max<int64_t>(1, std::min(plan.most_chunks, resident_of(where, 4, plan.chunks) / searches));
  const Launch shared_out{dim3(static_cast<unsigned>(searches * per_search))};
  if (given != nullptr) {
    launch_striding(where, searches, given_kernel, tables, *given, wide, outputs);
  } else {
    const auto drawn = static_cast<unsigned>(plan.vectors.size() * thread_groups<wide>);
    launch(where, {dim3(drawn), sample_threads}, draw_kernel<wide>, tables);
    launch(where, {dim3(static_cast<unsigned>(searches)), sample_threads}, bracket_kernel<wide>, tables);
    if (passes) {
      launch(where, {dim3(static_cast<unsigned>(resident_of(where, count_blocks, plan.chunks)))}, count_kernel<wide>, tables);
      for (int pass = 0; pass < digit_passes<wide>; ++pass) launch(where, shared_out, digit_kernel<wide>, tables, pass, per_search);
    }
    launch(where, each, found_kernel<wide>, tables, passes ? digit_passes<wide> : 0, outputs);
  }
  if (!ties || plan.chunks == 0) return;
  launch(where, shared_out, equal_kernel<wide>, tables, per_search);
  launch(where, {dim3(static_cast<unsigned>(searches)), tie_threads}, tie_kernel<wide>, tables, outputs);
}

template <bool wide>
void run_queries(const Tensor& where, const std::vector<RankQuery>& queries, const GivenThresholds* given, SearchOutputs outputs) {
  size_t next = 0;
  GivenThresholds own = given == nullptr ? GivenThresholds{} : *given;
  while (next < queries.size()) {
    SearchPlan plan;
    int64_t room = candidate_room;
    do {
      if (given == nullptr) room -= memory_of<wide>(queries[next]);
      if (room < 0 && !plan.vectors.empty()) break;
      add_to<wide>(&plan, queries[next]);
      ++next;
    } while (next < queries.size());
    run<wide>(where, plan, given == nullptr ? nullptr : &own, outputs);
    outputs.first += static_cast<int64_t>(plan.requests.size());
  }
}

}  // namespace

void find_ranks(const Tensor& where, const std::vector<RankQuery>& queries, bool wide, const SearchOutputs& outputs) {
  std::vector<RankQuery> parts;
  for (const RankQuery& query : queries) {
    for (size_t first = 0; first < query.ranks.size(); first += ranks_together) {
      const size_t end = std::min(query.ranks.size(), first + ranks_together);
      parts.push_back({query.segments, query.numel, {query.ranks.begin() + first, query.ranks.begin() + end}});
    }
  }
  if (wide) {
    run_queries<true>(where, parts, nullptr, outputs);
  } else {
    run_queries<false>(where, parts, nullptr, outputs);
  }
}

namespace {

std::vector<RankQuery> queries_of(const std::vector<DeviceDelta>& deltas, int64_t numel, const std::vector<int64_t>& ranks, int cuts) {
  std::vector<RankQuery> queries;
  for (size_t i = 0; i < deltas.size(); ++i) {
    const auto first = ranks.begin() + static_cast<int64_t>(i) * cuts;
    queries.push_back({{{deltas[i], numel}}, numel, ranks_of_cuts({first, first + cuts}, numel)});
  }
  return queries;
}

Tensor empty_cuts(const Tensor& where, int64_t deltas, int64_t cuts) {
  return torch::stable::new_empty(where, {deltas, cuts, 2}, ScalarType::Long);
}

}  // namespace

Tensor find_cuts(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t numel, const std::vector<int64_t>& ranks, int cuts,
                 bool wide) {
  Tensor found = empty_cuts(where, static_cast<int64_t>(deltas.size()), cuts);
  SearchOutputs outputs;
  outputs.cuts = static_cast<DeviceCut*>(found.mutable_data_ptr());
  find_ranks(where, queries_of(deltas, numel, ranks, cuts), wide, outputs);
  return found;
}

Tensor cuts_of_thresholds(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t numel, const Tensor& threshold,
                          const Tensor& equal_kept, int cuts, bool wide) {
  Tensor found = empty_cuts(where, static_cast<int64_t>(deltas.size()), cuts);
  SearchOutputs outputs;
  outputs.cuts = static_cast<DeviceCut*>(found.mutable_data_ptr());
  const GivenThresholds given{threshold.const_data_ptr(), dtype_of(threshold, "threshold"),
                              static_cast<const int64_t*>(equal_kept.const_data_ptr())};
  const std::vector<int64_t> ranks(deltas.size() * static_cast<size_t>(cuts), 0);
  const std::vector<RankQuery> queries = queries_of(deltas, numel, ranks, cuts);
  if (wide) {
    run_queries<true>(where, queries, &given, outputs);
  } else {
    run_queries<false>(where, queries, &given, outputs);
  }
  return found;
}

}  // namespace taskloom
