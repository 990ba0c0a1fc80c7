// sparse_merge of any select, election, vote and dtypes, and the passes before it that read the same entries. Bytes moved: base, every
// tuned tensor and out once; an election reads the tuned tensors a second time and a TALL vote a third. A thread takes the same eight
// entries through all stages, so what it reads again it read a moment ago: no more threads run at once than have their entries in cache.
#include <algorithm>

#include "masked/sparse_merge_stages.h"
#include "masked/sparse_merge_sums.h"

namespace taskloom {
namespace {

// Bytes of entries that the threads of a multiprocessor should hold in its first-level cache between two readings.
constexpr int64_t cached_bytes = 160 << 10;

template <class Acc>
__device__ void count_tall_votes(const DeviceMerge& merge, int64_t begin, const Acc (&base)[vector_entries],
                                 const Acc (&combined)[vector_entries], int32_t (&votes)[vector_entries]) {
  for (int t = 0; t < merge.count; ++t) {
    const DeviceTask& task = merge.tasks[t];
    const auto weight = static_cast<Acc>(task.weight), lambda = static_cast<Acc>(task.tall_mask_lambda);
    Acc delta[vector_entries];
    load_delta(merge, task, begin, base, delta);
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      const Acc own = weight * delta[i];
      const Acc rest = combined[i] - own;
      const Acc bound = lambda * (rest < Acc(0) ? -rest : rest);
      votes[i] += (own < Acc(0) ? -own : own) > bound ? 1 : 0;
    }
  }
}

template <class Acc>
__global__ void __launch_bounds__(cuda_threads, sizeof(Acc) == 4 ? 2 : 1) merge_entries_kernel(DeviceMerge merge) {
  const bool zero_positive = zero_is_positive(merge);
  const int64_t groups = vectors(merge.end - merge.begin);
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const int64_t begin = merge.begin + group * vector_entries;
    Acc base[vector_entries], combined[vector_entries], weight_sum[vector_entries];
    int32_t votes[vector_entries];
    load_base(merge, begin, base);
    uint32_t positive = 0;
    if (merge.elect != Elect::none) {
      election(merge, begin, base, combined);
      positive = elected_positive(combined, zero_positive);
    }
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) combined[i] = weight_sum[i] = Acc(0), votes[i] = 0;
    for (int t = 0; t < merge.count; ++t) {
      const auto weight = static_cast<Acc>(merge.tasks[t].weight);
      Acc part[vector_entries];
      load_delta(merge, merge.tasks[t], begin, base, part);
      const uint32_t kept = contribution(merge, t, begin, part, part);
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) {
        bool counts = part[i] != Acc(0);
        if (merge.elect != Elect::none) {
          counts = positive >> i & 1u ? part[i] > Acc(0) : part[i] < Acc(0);
          combined[i] += counts ? part[i] : Acc(0);
        } else {
          combined[i] += part[i];
        }
        weight_sum[i] += counts ? weight : Acc(0);
        votes[i] += static_cast<int32_t>(kept >> i & 1u);
      }
    }
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if (merge.combine == Combine::disjoint_mean) combined[i] /= weight_sum[i] == Acc(0) ? Acc(1) : weight_sum[i];
      if (merge.combine == Combine::weighted_mean) combined[i] /= static_cast<Acc>(merge.divisor);
    }
    if (merge.vote == Vote::tall) {
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) votes[i] = 0;
      count_tall_votes(merge, begin, base, combined, votes);
    }
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      combined[i] = static_cast<Acc>(merge.scale) * combined[i];
      if (merge.vote != Vote::none && votes[i] < merge.consensus_k) combined[i] = Acc(0);
      if (merge.base.data != nullptr) combined[i] = base[i] + combined[i];
    }
    store_eight(merge.out, begin, merge.end, combined);
  }
}

template <class Acc>
__global__ void __launch_bounds__(cuda_threads, 2) elected_signs_kernel(DeviceMerge merge, int64_t* sign_sum) {
  const int64_t groups = vectors(merge.end - merge.begin);
  int64_t balance = 0;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const int64_t begin = merge.begin + group * vector_entries;
    Acc base[vector_entries], sum[vector_entries];
    load_base(merge, begin, base);
    election(merge, begin, base, sum);
    const uint32_t inside = entries_before(begin, merge.end);
    int32_t own = 0;
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if (inside >> i & 1u) own += (sum[i] > Acc(0) ? 1 : 0) - (sum[i] < Acc(0) ? 1 : 0);
    }
    balance += own;
  }
  add_block_count(balance, sign_sum);
}

// Blocks of one task after the other: sums[task][block][2].
template <class Acc>
__global__ void __launch_bounds__(cuda_threads, 2) norms_kernel(DeviceMerge merge, int64_t blocks, double* sums) {
  const int t = static_cast<int>(blockIdx.x / blocks);
  const int64_t block = blockIdx.x % blocks;
  const int64_t groups = vectors(merge.end - merge.begin);
  double before = 0, after = 0;
  for (int64_t group = block * blockDim.x + threadIdx.x; group < groups; group += blocks * blockDim.x) {
    const int64_t begin = merge.begin + group * vector_entries;
    Acc base[vector_entries], delta[vector_entries];
    load_base(merge, begin, base);
    load_delta(merge, merge.tasks[t], begin, base, delta);
    const uint32_t inside = entries_before(begin, merge.end);
    const uint32_t kept = kept_entries(merge, t, begin, delta) & inside;
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      const auto size = static_cast<double>(delta[i] < Acc(0) ? -delta[i] : delta[i]);
      before += inside >> i & 1u ? size : 0.0;
      after += kept >> i & 1u ? size : 0.0;
    }
  }
  before = block_sum(before);
  after = block_sum(after);
  if (threadIdx.x != 0) return;
  double* const own = sums + 2 * static_cast<int64_t>(blockIdx.x);
  own[0] = before, own[1] = after;
}

// A block per task: its blocks' sums in their order.
__global__ void __launch_bounds__(cuda_threads) total_norms_kernel(const double* sums, int64_t blocks, double* totals) {
  const double* const own = sums + 2 * blocks * blockIdx.x;
  double before = 0, after = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) before += own[2 * block], after += own[2 * block + 1];
  before = block_sum(before);
  after = block_sum(after);
  if (threadIdx.x != 0) return;
  totals[2 * blockIdx.x] += before;
  totals[2 * blockIdx.x + 1] += after;
}

__global__ void __launch_bounds__(cuda_threads) l1_factors_kernel(const double* totals, DeviceTask* tasks, int32_t count) {
  // mergekit leaves a delta alone where either norm is below this.
  constexpr double least_norm = 1e-7;
  for (int64_t t = grid_index(); t < count; t += grid_stride()) {
    const double before = totals[2 * t], after = totals[2 * t + 1];
    tasks[t].factor = before >= least_norm && after >= least_norm ? before / after : 1.0;
  }
}

// Blocks that take the merge's entries; where they are read again, as few as leave them in cache in between.
int64_t merge_blocks(const Tensor& where, const DeviceMerge& merge, int64_t threads_of_block) {
  const int64_t blocks = striding_blocks(where, vectors(merge.end - merge.begin), threads_of_block);
  if (merge.elect == Elect::none && merge.vote != Vote::tall) return blocks;
  const int64_t bytes = threads_of_block * vector_entries * 2 * merge.count;
  const int64_t per_multiprocessor = std::clamp<int64_t>(cached_bytes / bytes, 2, resident_blocks);
  return std::min(blocks, multiprocessor_count(where) * per_multiprocessor);
}

}  // namespace

void merge_entries(const Tensor& where, bool wide, const DeviceMerge& merge) {
  const Launch shape{dim3(static_cast<unsigned>(merge_blocks(where, merge, cuda_threads)))};
  if (wide) {
    launch(where, shape, merge_entries_kernel<double>, merge);
  } else {
    launch(where, shape, merge_entries_kernel<float>, merge);
  }
}

void add_elected_signs(const Tensor& where, bool wide, const DeviceMerge& merge, int64_t* sign_sum) {
  const int64_t groups = vectors(merge.end - merge.begin);
  if (wide) {
    launch_striding(where, groups, elected_signs_kernel<double>, merge, sign_sum);
  } else {
    launch_striding(where, groups, elected_signs_kernel<float>, merge, sign_sum);
  }
}

void add_norms(const Tensor& where, bool wide, const DeviceMerge& merge, double* totals) {
  const int64_t blocks = striding_blocks(where, vectors(merge.end - merge.begin), cuda_threads);
  if (blocks == 0) return;
  const Tensor sums = torch::stable::new_empty(where, {2 * blocks * merge.count}, ScalarType::Double);
  auto* const parts = static_cast<double*>(sums.mutable_data_ptr());
  const Launch shape{dim3(static_cast<unsigned>(blocks * merge.count))};
  if (wide) {
    launch(where, shape, norms_kernel<double>, merge, blocks, parts);
  } else {
    launch(where, shape, norms_kernel<float>, merge, blocks, parts);
  }
  launch(where, {dim3(static_cast<unsigned>(merge.count))}, total_norms_kernel, static_cast<const double*>(parts), blocks, totals);
}

void set_l1_factors(const Tensor& where, const double* totals, DeviceTask* tasks, int32_t count) {
  launch_striding(where, count, l1_factors_kernel, totals, tasks, count);
}

}  // namespace taskloom
