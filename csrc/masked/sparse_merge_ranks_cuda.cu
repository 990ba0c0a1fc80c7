// rank_dropout of sparse_merge: a block sorts a row's magnitudes, least significant digit first and stably, in shared memory where the row
// fits there and in a workspace of its own in global memory otherwise, and keeps each entry by the probability of its rank. Bytes moved: a
// row's base and tuned entries in, a bit or a multiplier an entry out; long rows add the workspace's, mostly in cache.
#include <algorithm>

#include "masked/sparse_merge_rows.h"
#include "masked/sparse_merge_sums.h"

namespace taskloom {
namespace {

constexpr int warps = cuda_threads / warp_size;
constexpr int digit_bits = 8;
constexpr int digits = 1 << digit_bits;
// With the counts of the warps' digits a block stays below 48 KiB.
constexpr int64_t sorted_shared_bytes = 38 << 10;
// Bytes of global workspace for all blocks, unless a single row takes more.
constexpr int64_t workspace_room = 256 << 20;

// Keys stay where they are; two arrays of their indices take turns.
template <class Acc, class Index>
struct RowSort {
  Bits<Acc>* keys;
  Index *order, *other;

  __device__ RowSort(char* memory, int64_t length)
      : keys(reinterpret_cast<Bits<Acc>*>(memory)), order(reinterpret_cast<Index*>(keys + length)), other(order + length) {}
  static int64_t bytes(int64_t length) { return (length * static_cast<int64_t>(sizeof(Acc) + 2 * sizeof(Index)) + 15) / 16 * 16; }

  // Lower indices come later, so that of equal keys the lower index ranks higher.
  __device__ void load(const DeviceMerge& merge, int t, const Row& row) {
    const int64_t length = row.end - row.begin;
    for (int64_t begin = row.first_vector() + threadIdx.x * vector_entries; begin < row.end; begin += blockDim.x * vector_entries) {
      Acc delta[vector_entries];
      load_row_delta(merge, t, begin, delta);
      const Bits<Acc> most = most_bits<Acc>(merge, merge.tasks[t]);
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) {
        if (row.inside(begin) >> i & 1u) keys[begin + i - row.begin] = magnitude_bits(delta[i], most);
      }
    }
    for (int64_t place = threadIdx.x; place < length; place += blockDim.x) order[place] = static_cast<Index>(length - 1 - place);
    __syncthreads();
  }

  // Calls body(place, digit, lanes of this warp with the same digit) for the warp's places, a warp's width at a time.
  template <class Body>
  __device__ void for_each_digit(int64_t length, int shift, Body body) const {
    const int64_t warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    const int64_t share = (length + cuda_threads - 1) / cuda_threads * warp_size;
    const int64_t end = min(length, (warp + 1) * share);
    for (int64_t from = warp * share; from < end; from += warp_size) {
      const int64_t place = from + lane;
      const unsigned digit = place < end ? static_cast<unsigned>(keys[order[place]] >> shift) & (digits - 1) : digits;
      body(place, digit, __match_any_sync(whole_warp, digit));
      __syncwarp(whole_warp);
    }
  }

  __device__ void sort_digit(int64_t length, int shift, int32_t* starts) {
    const unsigned warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    for (int i = static_cast<int>(threadIdx.x); i < digits * warps; i += cuda_threads) starts[i] = 0;
    __syncthreads();
    for_each_digit(length, shift, [&](int64_t, unsigned digit, unsigned same) {
      if (digit < digits && static_cast<unsigned>(__ffs(static_cast<int>(same))) == lane + 1) starts[digit * warps + warp] += __popc(same);
    });
    __syncthreads();
    int32_t* const own = starts + threadIdx.x * warps;
    int32_t count = 0, total = 0;
    for (int other_warp = 0; other_warp < warps; ++other_warp) count += own[other_warp];
    int32_t start = block_sum_before(count, &total);
    for (int other_warp = 0; other_warp < warps; ++other_warp) {
      const int32_t of_warp = own[other_warp];
      own[other_warp] = start;
      start += of_warp;
    }
    // One digit for all leaves their order as it is.
    if (__syncthreads_or(count == length)) return;
    for_each_digit(length, shift, [&](int64_t place, unsigned digit, unsigned same) {
      const int32_t begin = digit < digits ? starts[digit * warps + warp] : 0;
      __syncwarp(whole_warp);
      if (digit == digits) return;
      const unsigned before = same & ((1u << lane) - 1u);
      other[begin + __popc(before)] = order[place];
      if (before == 0) starts[digit * warps + warp] = begin + __popc(same);
    });
    __syncthreads();
    Index* const swap = order;
    order = other;
    other = swap;
  }

  // Leaves in `other` the ascending rank of every entry.
  __device__ void rank(int64_t length) {
    TASKLOOM_SHARED(int32_t, starts, digits* warps);
    for (int shift = 0; shift < 8 * static_cast<int>(sizeof(Acc)); shift += digit_bits) sort_digit(length, shift, starts);
    for (int64_t place = threadIdx.x; place < length; place += blockDim.x) other[order[place]] = static_cast<Index>(place);
    __syncthreads();
  }
};

// Keeps a vector's entries of one row by their ranks: DELLA's keep probability grows linearly with the rank, in float32.
template <class Acc, class Index>
__device__ void keep_by_rank(const DeviceMerge& merge, int t, const Row& row, int64_t begin, const Index* ranks) {
  const DeviceTask& task = merge.tasks[t];
  const int64_t length = row.end - row.begin;
  const auto last = static_cast<float>(length > 1 ? length - 1 : 1);
  const uint32_t inside = row.inside(begin);
  uint32_t kept = 0;
  Acc multipliers[vector_entries];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const PhiloxBlock random = philox_4x32_10(merge.seed, task.key, (static_cast<uint64_t>(begin) >> 2) + half);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int i = 4 * half + word;
      multipliers[i] = Acc(0);
      if ((inside >> i & 1u) == 0) continue;
      const float share = static_cast<float>(ranks[begin + i - row.begin]) / last;
      const float raised = share * task.spread;
      const float probability = task.lowest + raised;
      if (static_cast<int64_t>(random.word[word]) >= word_limit(static_cast<double>(probability))) continue;
      kept |= 1u << i;
      multipliers[i] = Acc(1) / static_cast<Acc>(probability);
    }
  }
  if (merge.multipliers == nullptr) {
    row.store_bits(merge, t, begin, kept);
    return;
  }
  const DeviceValues to = multipliers_of<Acc>(merge, t);
  if (inside == 0xffu) {
    store_eight(to, begin - merge.first, merge.end - merge.first, multipliers);
    return;
  }
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    if (inside >> i & 1u) store_entry(to, begin + i - merge.first, multipliers[i]);
  }
}

// `workspace`: RowSort::bytes for each block, or null where shared memory serves.
template <class Acc, class Index>
__global__ void __launch_bounds__(cuda_threads, 3)
    select_rows_by_rank_kernel(DeviceMerge merge, int64_t length, char* workspace, int64_t bytes) {
  TASKLOOM_DYNAMIC_SHARED(char, shared);
  char* const memory = workspace == nullptr ? shared : workspace + blockIdx.x * bytes;
  const RowBundles bundles(merge, length);
  for (int64_t item = blockIdx.x; item < bundles.count * merge.count; item += gridDim.x) {
    const int t = static_cast<int>(item % merge.count);
    bundles.for_each_row(item / merge.count, [&](const Row& row) {
      RowSort<Acc, Index> sort(memory, length);
      sort.load(merge, t, row);
      sort.rank(length);
      for (int64_t begin = row.first_vector() + threadIdx.x * vector_entries; begin < row.end; begin += blockDim.x * vector_entries) {
        keep_by_rank<Acc>(merge, t, row, begin, sort.other);
      }
      // The next row takes the same memory, and may share a byte.
      __syncthreads();
    });
  }
}

template <class Acc>
void select_by_rank(const Tensor& where, const DeviceMerge& merge, int64_t length) {
  const int64_t items = RowBundles(merge, length).count * merge.count;
  const int64_t blocks = striding_blocks(where, items, 1);
  const int64_t shared = RowSort<Acc, uint16_t>::bytes(length);
  if (shared <= sorted_shared_bytes) {
    const Launch shape{dim3(static_cast<unsigned>(blocks)), cuda_threads, static_cast<unsigned>(shared)};
    launch(where, shape, select_rows_by_rank_kernel<Acc, uint16_t>, merge, length, static_cast<char*>(nullptr), int64_t{0});
    return;
  }
  const int64_t bytes = RowSort<Acc, int32_t>::bytes(length);
  const int64_t sharing = std::min(blocks, std::max<int64_t>(1, workspace_room / bytes));
  const Tensor workspace = torch::stable::new_empty(where, {sharing * bytes}, ScalarType::Byte);
  launch(where, {dim3(static_cast<unsigned>(sharing))}, select_rows_by_rank_kernel<Acc, int32_t>, merge, length,
         static_cast<char*>(workspace.mutable_data_ptr()), bytes);
}

}  // namespace

void select_rows_by_rank(const Tensor& where, bool wide, const DeviceMerge& merge, int64_t length) {
  if (wide) {
    select_by_rank<double>(where, merge, length);
  } else {
    select_by_rank<float>(where, merge, length);
  }
}

}  // namespace taskloom
