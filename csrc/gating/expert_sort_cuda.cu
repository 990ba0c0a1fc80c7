// expert_sort: CUDA kernels. Bytes moved: the ids twice, order and inverse once. Each warp takes neighbouring entries, and has counts of
// its own in shared memory: added up over warps and blocks they say where its entries go, and equal experts among 32 neighbours are told
// apart by their lanes, so that no entry overtakes another. Few entries are one block's, in one launch. What padded blocks hold is filled
// in by one more.
#include <algorithm>
#include <tuple>

#include "common/checks.h"
#include "common/cuda_assert.h"
#include "common/cuda_launch.h"
#include "gating/expert_sort.h"

namespace taskloom {
namespace {

constexpr int64_t shared_counts = 12288 - 64;  // 48 KiB, less what the scans need
constexpr int most_warps = 32, usual_warps = 8;
constexpr int64_t entries_alone = 8192;  // at most, of a single block
constexpr int64_t most_blocks = 256;

template <class Index>
struct DeviceSort {
  const Index* ids;
  int32_t entries, experts, per_warp;
  int32_t *order, *inverse, *offsets;
  int32_t* padded_offsets;  // null without blocks
  int32_t block;
  bool* fine;
};

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / warp_size; }

// The sum of a warp's values up to each lane's own.
__device__ inline int32_t sum_to_lane(int32_t value) {
  for (int delta = 1; delta < warp_size; delta *= 2) {
    const int32_t before = __shfl_up_sync(whole_warp, value, static_cast<unsigned>(delta));
    if (lane_index() >= delta) value += before;
  }
  return value;
}

// Turns n values into the sums of those before each, and returns the sum of all. Every thread of the block has to call it.
__device__ int32_t exclusive_sums(int32_t* values, int32_t n) {
  TASKLOOM_SHARED(int32_t, of_warps, warp_size);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int32_t each = (n + threads - 1) / threads;
  const int32_t begin = min(thread * each, n), end = min(begin + each, n);
  int32_t own = 0;
  for (int32_t i = begin; i < end; ++i) own += values[i];
  const int32_t in_warp = sum_to_lane(own);
  if (lane_index() == warp_size - 1) of_warps[warp_index()] = in_warp;
  __syncthreads();
  int32_t before = in_warp - own, total = 0;
  for (int warp = 0; warp < threads / warp_size; ++warp) {
    if (warp < warp_index()) before += of_warps[warp];
    total += of_warps[warp];
  }
  for (int32_t i = begin; i < end; ++i) {
    const int32_t value = values[i];
    values[i] = before;
    before += value;
  }
  __syncthreads();
  return total;
}

// Calls body(entry, expert) for the entries of a warp's run, 32 neighbours together: expert is -1 for lanes without one, and for what is no
// expert.
template <class Index, class Body>
__device__ void over_run(const DeviceSort<Index>& sort, const Body& body) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (static_cast<int>(blockDim.x) / warp_size) + warp_index();
  const int64_t begin = unit * sort.per_warp, end = min(begin + sort.per_warp, static_cast<int64_t>(sort.entries));
  for (int64_t first = begin; first < end; first += warp_size) {
    const int64_t entry = first + lane_index();
    const int64_t expert = entry < end ? static_cast<int64_t>(sort.ids[entry]) : -1;
    body(static_cast<int32_t>(entry), expert >= 0 && expert < sort.experts ? static_cast<int32_t>(expert) : -1);
  }
}

// Each block's counts: [experts, blocks].
template <class Index>
__global__ void __launch_bounds__(cuda_threads) expert_count_kernel(DeviceSort<Index> sort, int32_t* counts) {
  TASKLOOM_DYNAMIC_SHARED(int32_t, own);
  for (int expert = static_cast<int>(threadIdx.x); expert < sort.experts; expert += static_cast<int>(blockDim.x)) own[expert] = 0;
  __syncthreads();
  over_run(sort, [&](int32_t, int32_t expert) {
    if (expert >= 0) atomicAdd(&own[expert], 1);
  });
  __syncthreads();
  for (int expert = static_cast<int>(threadIdx.x); expert < sort.experts; expert += static_cast<int>(blockDim.x)) {
    counts[static_cast<int64_t>(expert) * gridDim.x + blockIdx.x] = own[expert];
  }
}

// Turns the blocks' counts of an expert, which a warp takes, into how many come before each block; and their sum.
__global__ void __launch_bounds__(cuda_threads) expert_prefix_kernel(int32_t* counts, int32_t blocks, int32_t experts, int32_t* totals) {
  const int64_t expert = grid_index() / warp_size;
  if (expert >= experts) return;
  int32_t* const own = counts + expert * blocks;
  int32_t before = 0;
  for (int32_t first = 0; first < blocks; first += warp_size) {
    const int32_t block = first + lane_index();
    const int32_t count = block < blocks ? own[block] : 0, reached = sum_to_lane(count);
    if (block < blocks) own[block] = before + reached - count;
    before += __shfl_sync(whole_warp, reached, warp_size - 1);
  }
  if (lane_index() == 0) totals[expert] = before;
}

// The offsets, which one block writes; `begins` has the experts' first places, and `room` is for as many numbers.
template <class Index>
__device__ void write_offsets(const DeviceSort<Index>& sort, const int32_t* begins, int32_t total, int32_t* room) {
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  for (int expert = first; expert < sort.experts; expert += step) {
    sort.offsets[expert] = begins[expert];
    const int32_t count = (expert + 1 < sort.experts ? begins[expert + 1] : total) - begins[expert];
    if (sort.padded_offsets != nullptr) room[expert] = (count + sort.block - 1) / sort.block * sort.block;
  }
  if (first == 0) {
    sort.offsets[sort.experts] = total;
    *sort.fine = total == sort.entries;
  }
  if (sort.padded_offsets == nullptr) return;
  __syncthreads();
  const int32_t padded = exclusive_sums(room, sort.experts);
  for (int expert = first; expert < sort.experts; expert += step) sort.padded_offsets[expert] = room[expert];
  if (first == 0) sort.padded_offsets[sort.experts] = padded;
}

// The places of a block's entries. `before` has how many of each expert come before each block, and `totals` the experts' sums; both are
// null for a single block.
template <class Index>
__global__ void __launch_bounds__(most_warps* warp_size)
    expert_place_kernel(DeviceSort<Index> sort, const int32_t* before, const int32_t* totals) {
  TASKLOOM_DYNAMIC_SHARED(int32_t, shared);
  const int experts = sort.experts, warps = static_cast<int>(blockDim.x) / warp_size;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  int32_t *const begins = shared, *const all = shared + experts, *const own = all + warp_index() * experts;
  for (int i = first; i < warps * experts; i += step) all[i] = 0;
  __syncthreads();
  over_run(sort, [&](int32_t, int32_t expert) {
    if (expert >= 0) atomicAdd(&own[expert], 1);
  });
  __syncthreads();
  for (int expert = first; expert < experts; expert += step) {
    int32_t total = 0;
    if (totals != nullptr) {
      total = totals[expert];
    } else {
      for (int warp = 0; warp < warps; ++warp) total += all[warp * experts + expert];
    }
    begins[expert] = total;
  }
  __syncthreads();
  const int32_t total = exclusive_sums(begins, experts);
  for (int expert = first; expert < experts; expert += step) {
    int32_t place = begins[expert];
    if (before != nullptr) place += before[static_cast<int64_t>(expert) * gridDim.x + blockIdx.x];
    for (int warp = 0; warp < warps; ++warp) {
      const int32_t count = all[warp * experts + expert];
      all[warp * experts + expert] = place;
      place += count;
    }
  }
  __syncthreads();
  over_run(sort, [&](int32_t entry, int32_t expert) {
    const unsigned alike = __match_any_sync(whole_warp, expert);
    const unsigned earlier = alike & ((1u << lane_index()) - 1);
    const int32_t place = expert >= 0 ? own[expert] + __popc(earlier) : 0;
    __syncwarp();
    if (expert >= 0 && place < sort.entries) {
      if (earlier == 0) own[expert] += __popc(alike);
      sort.order[place] = entry;
      sort.inverse[entry] = place;
    }
    __syncwarp();
  });
  __syncthreads();
  if (blockIdx.x == 0) write_offsets(sort, begins, total, all);
}

__global__ void __launch_bounds__(cuda_threads)
    expert_blocks_kernel(const int32_t* __restrict__ order, const int32_t* __restrict__ offsets, const int32_t* __restrict__ padded_offsets,
                         int32_t experts, int32_t entries, int32_t block, int64_t size, int32_t* __restrict__ padded_order,
                         int32_t* __restrict__ block_expert) {
  for (int64_t place = grid_index(); place < size; place += grid_stride()) {
    int32_t low = 0, high = experts;  // the run that holds the place is low's or one before high's
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      if (padded_offsets[middle] <= place) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const bool owned = place < padded_offsets[experts];
    const int64_t source = offsets[low] + place - padded_offsets[low];
    padded_order[place] = owned && source < offsets[low + 1] ? order[source] : entries;
    if (place % block == 0) block_expert[place / block] = owned ? low : -1;
  }
}

int32_t* words_of(const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); }

template <class Index>
void sort_entries(const Tensor& where, DeviceSort<Index> sort) {
  const int64_t experts = sort.experts, fitting = shared_counts / experts - 1;
  const bool alone = sort.entries <= entries_alone;
  const int64_t warps = std::min<int64_t>(fitting, alone ? most_warps : usual_warps);
  const int64_t blocks = alone ? 1 : std::min<int64_t>(most_blocks, (sort.entries + 4095) / 4096);
  const int64_t rounds = (sort.entries + blocks * warps * warp_size - 1) / (blocks * warps * warp_size);
  sort.per_warp = static_cast<int32_t>(rounds * warp_size);
  const auto threads = static_cast<unsigned>(warps * warp_size), grid = static_cast<unsigned>(blocks);
  const auto bytes = [&](int64_t counts) { return static_cast<unsigned>(counts * experts * static_cast<int64_t>(sizeof(int32_t))); };
  const int32_t* no_counts = nullptr;
  if (alone) {
    launch(where, {dim3(grid), threads, bytes(warps + 1)}, expert_place_kernel<Index>, sort, no_counts, no_counts);
    return;
  }
  const Tensor counts = torch::stable::new_empty(where, {experts * blocks}, ScalarType::Int);
  const Tensor totals = torch::stable::new_empty(where, {experts}, ScalarType::Int);
  launch(where, {dim3(grid), threads, bytes(1)}, expert_count_kernel<Index>, sort, words_of(counts));
  launch(where, {dim3(static_cast<unsigned>((experts + usual_warps - 1) / usual_warps))}, expert_prefix_kernel, words_of(counts),
         static_cast<int32_t>(blocks), sort.experts, words_of(totals));
  launch(where, {dim3(grid), threads, bytes(warps + 1)}, expert_place_kernel<Index>, sort, static_cast<const int32_t*>(words_of(counts)),
         static_cast<const int32_t*>(words_of(totals)));
}

using Sorted = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Sorted expert_sort_cuda(const Tensor& ids, int64_t num_experts, int64_t block) {
  check_on_device(ids);
  constexpr int64_t most = (int64_t{1} << 31) - 1, most_experts = shared_counts / 2;
  const int64_t entries = ids.numel();
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= most_experts, "num_experts: expected 1 to ", most_experts, " on a GPU, got ",
                  num_experts);
  STD_TORCH_CHECK(block >= 0 && block <= most, "block: expected 0 or more, fewer than 2^31, got ", block);
  const int64_t size = block == 0 ? 0 : padded_size(entries, num_experts, block), experts = num_experts;
  STD_TORCH_CHECK(entries <= most && size <= most, "ids: expected fewer than 2^31 entries, with what fills blocks up, got ", entries);
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "ids: expected an int32 or int64 tensor, got ScalarType ",
                  static_cast<int>(type));
  const Tensor given = contiguous_of(ids);
  const auto made = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) { return torch::stable::new_empty(given, sizes, ScalarType::Int); };
  Tensor order = made({entries}), inverse = made(ids.sizes()), offsets = made({experts + 1});
  Tensor padded_order = made({size}), padded_offsets = made({block == 0 ? 0 : experts + 1});
  Tensor block_expert = made({block == 0 ? 0 : size / block});
  const Tensor fine = torch::stable::new_empty(given, {1}, ScalarType::Bool);
  const auto run = [&](auto index) {
    using Index = decltype(index);
    sort_entries(given, DeviceSort<Index>{static_cast<const Index*>(given.const_data_ptr()), static_cast<int32_t>(entries),
                                          static_cast<int32_t>(experts), 0, words_of(order), words_of(inverse), words_of(offsets),
                                          block == 0 ? nullptr : words_of(padded_offsets), static_cast<int32_t>(block),
                                          static_cast<bool*>(fine.mutable_data_ptr())});
  };
  if (type == ScalarType::Long) {
    run(int64_t{});
  } else {
    run(int32_t{});
  }
  assert_on_device(fine, "expert_sort: ids: expected the numbers of experts, 0 to num_experts - 1");
  if (size > 0) {
    launch_striding(given, size, expert_blocks_kernel, static_cast<const int32_t*>(words_of(order)),
                    static_cast<const int32_t*>(words_of(offsets)), static_cast<const int32_t*>(words_of(padded_offsets)),
                    static_cast<int32_t>(experts), static_cast<int32_t>(entries), static_cast<int32_t>(block), size, words_of(padded_order),
                    words_of(block_expert));
  }
  return {order, inverse, offsets, padded_order, padded_offsets, block_expert};
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("expert_sort", TORCH_BOX(&expert_sort_cuda)); }

}  // namespace taskloom
