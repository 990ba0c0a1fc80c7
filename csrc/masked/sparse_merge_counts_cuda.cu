// What sparse_merge counts beside its result. Bytes moved: base and tuned tensors once for the counts, and for the inner products once for
// each pair of groups of four tasks.
#include <algorithm>

#include "masked/sparse_merge_stages.h"
#include "masked/sparse_merge_sums.h"

namespace taskloom {
namespace {

// Tasks whose kept entries a block counts in shared memory; those of further tasks are counted where the result is.
constexpr int32_t most_counted = 4096;
// Tasks of a group: a thread multiplies each of one group's with each of another's.
constexpr int group_tasks = 4;

template <class Acc>
__global__ void __launch_bounds__(cuda_threads, sizeof(Acc) == 4 ? 2 : 1) count_kernel(DeviceMerge merge, MergeCounts counts) {
  TASKLOOM_DYNAMIC_SHARED(unsigned long long, kept_here);
  const int shared = min(merge.count, most_counted);
  for (int t = static_cast<int>(threadIdx.x); t < shared; t += cuda_threads) kept_here[t] = 0;
  __syncthreads();
  const int64_t groups = vectors(merge.end - merge.begin);
  int64_t conflicts = 0, balance = 0;
  bool nonfinite = false;
  // Whole warps go on together: lanes beyond the end count nothing.
  for (int64_t group = grid_index(); group - threadIdx.x % warp_size < groups; group += grid_stride()) {
    const int64_t begin = merge.begin + group * vector_entries;
    const uint32_t inside = entries_before(begin, merge.end);
    Acc base[vector_entries], sum[vector_entries];
    load_base(merge, begin, base);
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) sum[i] = Acc(0);
    uint32_t positive = 0, negative = 0;
    for (int t = 0; t < merge.count; ++t) {
      Acc part[vector_entries];
      load_delta(merge, merge.tasks[t], begin, base, part);
      constexpr auto infinity = static_cast<Bits<Acc>>(is_wide_acc<Acc> ? 0x7ff0000000000000 : 0x7f800000);
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) {
        nonfinite |= magnitude_bits(part[i], most_bits<Acc>(merge, merge.tasks[t])) >= infinity && (inside >> i & 1u);
      }
      const uint32_t kept = inside == 0 ? 0u : contribution(merge, t, begin, part, part) & inside;
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) {
        positive |= (part[i] > Acc(0) ? 1u : 0u) << i;
        negative |= (part[i] < Acc(0) ? 1u : 0u) << i;
      }
      if (merge.elect != Elect::none) add_to_election(merge.elect, part, sum);
      const unsigned of_warp = __reduce_add_sync(whole_warp, static_cast<unsigned>(__popc(kept)));
      if (threadIdx.x % warp_size == 0 && of_warp != 0) {
        atomicAdd(t < shared ? kept_here + t : reinterpret_cast<unsigned long long*>(counts.kept + t),
                  static_cast<unsigned long long>(of_warp));
      }
    }
    conflicts += __popc(positive & negative & inside);
    int own = 0;
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if (inside >> i & 1u) own += (sum[i] > Acc(0) ? 1 : 0) - (sum[i] < Acc(0) ? 1 : 0);
    }
    balance += own;
  }
  add_block_count(conflicts, counts.conflicts);
  add_block_count(balance, counts.sign_sum);
  if (__syncthreads_or(nonfinite) && threadIdx.x == 0) *counts.nonfinite = 1;
  for (int t = static_cast<int>(threadIdx.x); t < shared; t += cuda_threads) {
    if (kept_here[t] != 0) atomicAdd(reinterpret_cast<unsigned long long*>(counts.kept + t), kept_here[t]);
  }
}

struct GroupPair {
  int first, second;
};

// The pair of groups that comes `index`-th: (0, 0), (0, 1), (1, 1), (0, 2), ...
__device__ inline GroupPair pair_at(int64_t index) {
  int second = 0;
  for (; index > second; ++second) index -= second + 1;
  return {static_cast<int>(index), second};
}

// Sums of one pair of groups by one block: sums[pair][block][group_tasks][group_tasks]. A product is rounded to Acc, and so is what a
// thread adds up in one vector.
template <class Acc>
__global__ void __launch_bounds__(cuda_threads, sizeof(Acc) == 4 ? 2 : 1) dots_kernel(DeviceMerge merge, int64_t blocks, double* sums) {
  const GroupPair pair = pair_at(blockIdx.x / blocks);
  const int first = pair.first * group_tasks, second = pair.second * group_tasks;
  const int64_t groups = vectors(merge.end - merge.begin);
  double dots[group_tasks][group_tasks] = {};
  for (int64_t group = blockIdx.x % blocks * blockDim.x + threadIdx.x; group < groups; group += blocks * blockDim.x) {
    const int64_t begin = merge.begin + group * vector_entries;
    Acc base[vector_entries], ours[group_tasks][vector_entries] = {};
    load_base(merge, begin, base);
#pragma unroll
    for (int t = 0; t < group_tasks; ++t) {
      if (first + t < merge.count) load_delta(merge, merge.tasks[first + t], begin, base, ours[t]);
    }
#pragma unroll
    for (int other = 0; other < group_tasks; ++other) {
      if (second + other >= merge.count) continue;
      Acc theirs[vector_entries];
      load_delta(merge, merge.tasks[second + other], begin, base, theirs);
#pragma unroll
      for (int t = 0; t < group_tasks; ++t) {
        Acc sum = Acc(0);
#pragma unroll
        for (int i = 0; i < vector_entries; ++i) sum += ours[t][i] * theirs[i];
        dots[t][other] += static_cast<double>(sum);
      }
    }
  }
  double* const own = sums + static_cast<int64_t>(blockIdx.x) * group_tasks * group_tasks;
#pragma unroll
  for (int t = 0; t < group_tasks; ++t) {
#pragma unroll
    for (int other = 0; other < group_tasks; ++other) {
      const double sum = block_sum(dots[t][other]);
      if (threadIdx.x == 0) own[t * group_tasks + other] = sum;
    }
  }
}

// A thread per inner product of a pair of groups: its blocks' sums in their order.
__global__ void __launch_bounds__(cuda_threads)
    total_dots_kernel(const double* sums, int64_t blocks, int64_t pairs, int32_t count, double* dots) {
  constexpr int products = group_tasks * group_tasks;
  for (int64_t item = grid_index(); item < pairs * products; item += grid_stride()) {
    const GroupPair pair = pair_at(item / products);
    const int product = static_cast<int>(item % products);
    const int64_t row = pair.first * group_tasks + product / group_tasks, column = pair.second * group_tasks + product % group_tasks;
    if (row > column || column >= count) continue;
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += sums[(item / products * blocks + block) * products + product];
    dots[row * count + column] = total;
    dots[column * count + row] = total;
  }
}

}  // namespace

void add_counts(const Tensor& where, bool wide, const DeviceMerge& merge, const MergeCounts& counts) {
  const int64_t blocks = striding_blocks(where, vectors(merge.end - merge.begin), cuda_threads);
  const auto shared = static_cast<unsigned>(std::min(merge.count, most_counted) * static_cast<int32_t>(sizeof(int64_t)));
  const Launch shape{dim3(static_cast<unsigned>(blocks)), cuda_threads, shared};
  if (wide) {
    launch(where, shape, count_kernel<double>, merge, counts);
  } else {
    launch(where, shape, count_kernel<float>, merge, counts);
  }
}

void find_dots(const Tensor& where, bool wide, const DeviceMerge& merge, double* dots) {
  const int64_t groups = (merge.count + group_tasks - 1) / group_tasks, pairs = groups * (groups + 1) / 2;
  const int64_t most = std::max<int64_t>(1, 2 * multiprocessor_count(where) * resident_blocks / pairs);
  const int64_t blocks = std::min(most, striding_blocks(where, vectors(merge.end - merge.begin), cuda_threads));
  const Tensor sums = torch::stable::new_empty(where, {pairs * blocks * group_tasks * group_tasks}, ScalarType::Double);
  auto* const parts = static_cast<double*>(sums.mutable_data_ptr());
  const Launch shape{dim3(static_cast<unsigned>(pairs * blocks))};
  if (wide) {
    launch(where, shape, dots_kernel<double>, merge, blocks, parts);
  } else {
    launch(where, shape, dots_kernel<float>, merge, blocks, parts);
  }
  launch_striding(where, pairs * group_tasks * group_tasks, total_dots_kernel, static_cast<const double*>(parts), blocks, pairs,
                  merge.count, dots);
}

}  // namespace taskloom
