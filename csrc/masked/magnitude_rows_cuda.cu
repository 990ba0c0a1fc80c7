// The search for ranks of magnitudes within rows. Bytes moved: tuned and base once, for rows of up to 32768 entries (4096 in float64): a
// warp holds a row of up to 1024 in its registers and bisects the 31 bits of the threshold, a block holds a longer one and counts its
// digits in shared memory. Longer rows are looked through one by one as tensors are (magnitude_ranks_cuda.cu).
#include <algorithm>

#include "common/cuda_table.h"
#include "masked/magnitude_query_cuda.h"
#include "masked/magnitude_search_cuda.h"

namespace taskloom {
namespace {

constexpr int wide_block = 1024;

struct RowTask {
  DeviceDelta delta;
  int64_t first_rank;
};

struct RowSearch {
  const RowTask* tasks;
  const int64_t* ranks;
  int64_t rows, length, total, cuts;
};

struct RowOutputs {
  SearchOutputs to;
  bool wide;
};

__device__ inline void store_row(const RowOutputs& outputs, int64_t place, const Selected& found, int64_t tie_end) {
  if (outputs.to.cuts != nullptr) outputs.to.cuts[place] = {found.bits, tie_end};
  if (outputs.to.kept == nullptr) return;
  outputs.to.kept[place] = found.kept;
  if (outputs.wide) {
    static_cast<int64_t*>(outputs.to.thresholds)[place] = found.bits;
  } else {
    static_cast<int32_t*>(outputs.to.thresholds)[place] = static_cast<int32_t>(found.bits);
  }
}

// What needs no search; false where the rank has to be looked for.
template <bool wide>
__device__ inline bool trivial_rank(int64_t rank, int64_t length, bool any, Selected* found) {
  constexpr int64_t most = wide ? INT64_MAX : INT32_MAX;
  if (rank <= 0 || length == 0) {
    *found = {most, 0, 0};
    return true;
  }
  if (any && rank >= length) {
    *found = {0, 1, 1};
    return true;
  }
  return false;
}

// Eight entries of a row that begins anywhere.
template <bool wide>
__device__ inline void load_row_group(const DeviceDelta& delta, int64_t row_begin, int64_t begin, int64_t length,
                                      MagnitudeBits<wide> (&bits)[vector_entries]) {
  DeviceDelta row = delta;
  const bool whole = row_begin % vector_entries == 0;
  row.tuned.aligned = whole && row.tuned.aligned;
  row.base.aligned = whole && row.base.aligned;
  load_magnitudes<wide>(row, row_begin + begin, row_begin + length, bits);
}

__device__ inline uint32_t warp_count(uint32_t own) { return __reduce_add_sync(whole_warp, own); }

// The threshold of `rank` among the magnitudes of a warp's lanes: its bits from the highest, each set where enough entries are no smaller.
template <bool wide, int groups>
__device__ inline Selected warp_select(const MagnitudeBits<wide> (&bits)[groups][vector_entries], int64_t rank) {
  using Bits = MagnitudeBits<wide>;
  auto count = [&](auto counted) {
    uint32_t own = 0;
#pragma unroll
    for (int slot = 0; slot < groups * vector_entries; ++slot) {
      own += counted(bits[slot / vector_entries][slot % vector_entries]) ? 1u : 0u;
    }
    return static_cast<int64_t>(warp_count(own));
  };
  Bits found = 0;
#pragma unroll 1
  for (int bit = wide ? 62 : 30; bit >= 0; --bit) {
    const Bits tried = found | static_cast<Bits>(Bits{1} << bit);
    if (count([&](Bits value) { return value >= tried; }) >= rank) found = tried;
  }
  const int64_t above = count([&](Bits value) { return value > found; });
  return {static_cast<int64_t>(found), rank - above, count([&](Bits value) { return value == found; })};
}

// A bit for each of the thread's entries that equals a magnitude.
template <int groups, class Bits>
__device__ inline uint32_t equal_entries(const Bits (&bits)[groups][vector_entries], int64_t magnitude) {
  const auto own = static_cast<Bits>(magnitude);
  uint32_t equal = 0;
#pragma unroll
  for (int slot = 0; slot < groups * vector_entries; ++slot) {
    if (bits[slot / vector_entries][slot % vector_entries] == own) equal |= 1u << slot;
  }
  return equal;
}

// The place of the n-th (from 1) of the set bits, or -1 where there are fewer or n is less.
__device__ inline int nth_bit(uint32_t bits, int n) {
  if (n < 1 || n > __popc(bits)) return -1;
  while (--n > 0) bits &= bits - 1;
  return __ffs(static_cast<int>(bits)) - 1;
}

// A warp for each row of up to 256 * groups entries.
template <bool wide, int groups>
__global__ void __launch_bounds__(cuda_threads, 3) warp_rows_kernel(RowSearch search, RowOutputs outputs) {
  const int lane = threadIdx.x % warp_size;
  const bool all_is_known = outputs.to.cuts != nullptr;
  for (int64_t place = grid_index() / warp_size; place < search.total; place += grid_stride() / warp_size) {
    const RowTask& task = search.tasks[place / search.rows];
    const int64_t row_begin = place % search.rows * search.length;
    MagnitudeBits<wide> bits[groups][vector_entries];
    load_groups(bits, [&](int group, auto& loaded) {
      load_row_group<wide>(task.delta, row_begin, (group * warp_size + lane) * vector_entries, search.length, loaded);
    });
    for (int64_t cut = 0; cut < search.cuts; ++cut) {
      const int64_t rank = search.ranks[task.first_rank + cut];
      Selected found;
      if (!trivial_rank<wide>(rank, search.length, all_is_known, &found)) found = warp_select<wide, groups>(bits, rank);
      const int64_t to = outputs.to.first + place * search.cuts + cut;
      if (!all_is_known || found.kept <= 0 || found.kept >= found.equal) {
        if (lane == 0) store_row(outputs, to, found, found.kept <= 0 ? 0 : INT64_MAX);
        continue;
      }
      const uint32_t equal = equal_entries(bits, found.bits);
      int left = static_cast<int>(found.kept);
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        const uint32_t own = equal >> (group * vector_entries) & 0xffu;
        int until = __popc(own);
#pragma unroll
        for (int step = 1; step < warp_size; step *= 2) {
          const int other = __shfl_up_sync(whole_warp, until, step);
          if (lane >= step) until += other;
        }
        const int last = nth_bit(own, left - until + __popc(own));
        if (last >= 0) store_row(outputs, to, found, (group * warp_size + lane) * vector_entries + last + 1);
        left -= __shfl_sync(whole_warp, until, warp_size - 1);
      }
    }
  }
}

// Blocks that a multiprocessor holds at once, for their registers.
template <bool wide, int threads>
constexpr int row_blocks = threads == wide_block ? 1 : (wide ? 2 : 3);

// A block for each row of as many entries as its threads hold.
template <bool wide, int threads>
__global__ void __launch_bounds__(threads, row_blocks<wide, threads>) block_rows_kernel(RowSearch search, RowOutputs outputs) {
  constexpr int groups = thread_groups<wide>;
  TASKLOOM_SHARED(uint32_t, histogram, digit_bins);
  TASKLOOM_SHARED(BlockWords, words, 1);
  const bool all_is_known = outputs.to.cuts != nullptr;
  const int64_t place = blockIdx.x;
  const RowTask& task = search.tasks[place / search.rows];
  const int64_t row_begin = place % search.rows * search.length;
  MagnitudeBits<wide> bits[groups][vector_entries];
  load_groups(bits, [&](int group, auto& loaded) {
    load_row_group<wide>(task.delta, row_begin, (group * threads + static_cast<int>(threadIdx.x)) * vector_entries, search.length, loaded);
  });
  for (int cut = 0; cut < static_cast<int>(search.cuts); ++cut) {
    const int64_t rank = search.ranks[task.first_rank + cut];
    Selected found;
    if (!trivial_rank<wide>(rank, search.length, all_is_known, &found)) {
      found = block_select<wide, groups, threads>(bits, rank, histogram, words);
    }
    if (!all_is_known || found.kept <= 0 || found.kept >= found.equal) {
      if (threadIdx.x == 0) store_row(outputs, outputs.to.first + place * search.cuts + cut, found, found.kept <= 0 ? 0 : INT64_MAX);
      continue;
    }
    const uint32_t equal = equal_entries(bits, found.bits);
    int left = static_cast<int>(found.kept);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      const uint32_t own = equal >> (group * vector_entries) & 0xffu;
      const int until = static_cast<int>(block_scan<threads>(__popc(own), words));
      const int last = nth_bit(own, left - until + __popc(own));
      if (last >= 0)
        store_row(outputs, outputs.to.first + place * search.cuts + cut, found,
                  (group * threads + static_cast<int>(threadIdx.x)) * vector_entries + last + 1);
      if (threadIdx.x == threads - 1) words->count = until;
      __syncthreads();
      left -= static_cast<int>(words->count);
      __syncthreads();
    }
  }
}

// Entries of the longest row that is held in registers: float64 ones take two each.
template <bool wide>
constexpr int64_t most_held = int64_t{wide ? cuda_threads : wide_block} * thread_groups<wide> * vector_entries;

template <bool wide>
void run(const Tensor& where, const RowSearch& search, const RowOutputs& outputs) {
  constexpr int64_t warp_entries = warp_size * vector_entries;
  const dim3 warps(static_cast<unsigned>(striding_blocks(where, search.total, cuda_threads / warp_size)));
  const dim3 blocks(static_cast<unsigned>(search.total));
  if (search.length <= warp_entries) {
    return launch(where, {warps}, warp_rows_kernel<wide, 1>, search, outputs);
  }
  if constexpr (!wide) {
    constexpr int groups = thread_groups<wide>;
    if (search.length <= groups * warp_entries) return launch(where, {warps}, warp_rows_kernel<wide, groups>, search, outputs);
    if (search.length > groups * cuda_threads * vector_entries) {
      return launch(where, {blocks, wide_block}, block_rows_kernel<wide, wide_block>, search, outputs);
    }
  }
  launch(where, {blocks}, block_rows_kernel<wide, cuda_threads>, search, outputs);
}

DeviceValues from_entry(const DeviceValues& values, int64_t entry) {
  if (values.data == nullptr) return values;
  const int64_t bytes = values.dtype == DType::f64 ? 8 : values.dtype == DType::f32 ? 4 : 2;
  char* const data = static_cast<char*>(values.data) + entry * bytes;
  return {data, values.dtype, (reinterpret_cast<uintptr_t>(data) & 15) == 0};
}

// Each row as a vector of its own.
void search_as_tensors(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t rows, int64_t row_length,
                       const std::vector<int64_t>& ranks, int cuts, bool wide, const SearchOutputs& outputs) {
  std::vector<RankQuery> queries;
  for (size_t i = 0; i < deltas.size(); ++i) {
    const auto first = ranks.begin() + static_cast<int64_t>(i) * cuts;
    std::vector<int64_t> own(first, first + cuts);
    if (outputs.cuts != nullptr) own = ranks_of_cuts(own, row_length);
    for (int64_t row = 0; row < rows; ++row) {
      const DeviceDelta delta{from_entry(deltas[i].tuned, row * row_length), from_entry(deltas[i].base, row * row_length)};
      queries.push_back({{{delta, row_length}}, row_length, own});
    }
  }
  find_ranks(where, queries, wide, outputs);
}

}  // namespace

void find_row_ranks(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t rows, int64_t row_length,
                    const std::vector<int64_t>& ranks, int cuts, bool wide, const SearchOutputs& outputs) {
  const int64_t total = static_cast<int64_t>(deltas.size()) * rows;
  if (total == 0 || cuts == 0) return;
  if (row_length > (wide ? most_held<true> : most_held<false>))
    return search_as_tensors(where, deltas, rows, row_length, ranks, cuts, wide, outputs);
  std::vector<RowTask> tasks;
  for (const DeviceDelta& delta : deltas) tasks.push_back({delta, static_cast<int64_t>(tasks.size()) * cuts});
  const Tensor task_table = device_table(where, tasks), rank_table = device_table(where, ranks);
  const RowSearch search{rows_of<RowTask>(task_table), rows_of<int64_t>(rank_table), rows, row_length, total, cuts};
  if (wide) {
    run<true>(where, search, {outputs, wide});
  } else {
    run<false>(where, search, {outputs, wide});
  }
}

Tensor find_row_cuts(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t rows, int64_t row_length,
                     const std::vector<int64_t>& ranks, int cuts, bool wide) {
  Tensor found = torch::stable::new_empty(where, {static_cast<int64_t>(deltas.size()), rows, cuts, 2}, ScalarType::Long);
  SearchOutputs outputs;
  outputs.cuts = static_cast<DeviceCut*>(found.mutable_data_ptr());
  find_row_ranks(where, deltas, rows, row_length, ranks, cuts, wide, outputs);
  return found;
}

}  // namespace taskloom
