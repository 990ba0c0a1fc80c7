// The common merges of sparse_merge, where all tensors are of one 16- or 32-bit dtype: the sum of selected deltas, and the election of
// signs by their sum. Bytes moved: base, every tuned tensor and out once; an election of more than eight tasks reads the tuned tensors
// twice. A thread takes 16 bytes of each tensor, with the loads of several tasks on their way at once. Same arithmetic in the same order as
// sparse_merge_entries_cuda.cu.
#include <algorithm>

#include "masked/sparse_merge_stages.h"

namespace taskloom {
namespace {

// Tasks whose contributions a thread holds in registers.
constexpr int most_held = 8;
// Tasks that are loaded together where contributions are not held.
constexpr int loaded_together = 4;
// Bytes of entries that the threads of a multiprocessor should hold in its first-level cache between two readings.
constexpr int64_t cached_bytes = 160 << 10;

// A task in shared memory.
struct alignas(16) FusedTask {
  float weight, factor;
  int32_t kept_bits, removed_bits;  // of its cuts
  int64_t kept_end, removed_end;
  const void* tuned;
  const uint8_t* mask;
  uint64_t key;
  int64_t limit;
};
static_assert(sizeof(FusedTask) == 64);
constexpr int64_t most_tasks = (48 << 10) / sizeof(FusedTask);

// 16 bytes of a tensor.
template <DType dtype>
struct Vector {
  static constexpr int entries = dtype == DType::f32 ? 4 : 8;
  uint32_t words[4];

  __device__ void load(const void* data, int64_t vector) {
    const uint4 four = static_cast<const uint4*>(data)[vector];
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }
  __device__ void store(void* data, int64_t vector) const {
    static_cast<uint4*>(data)[vector] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __device__ float value(int i) const {
    if constexpr (dtype == DType::f32) return __uint_as_float(words[i]);
    const uint32_t word = words[i / 2];
    if constexpr (dtype == DType::f16) return half_value(i % 2 == 0 ? word & 0xffffu : word >> 16);
    return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
  __device__ void set(int i, float value) {
    if constexpr (dtype == DType::f32) {
      words[i] = __float_as_uint(value);
    } else {
      const uint32_t bits = dtype == DType::f16 ? half_bits(value) : bfloat16_bits(value);
      words[i / 2] = i % 2 == 0 ? bits : words[i / 2] | bits << 16;
    }
  }
};

// Fills shared memory with the tasks; the block does it together.
__device__ inline void share_tasks(const DeviceMerge& merge, FusedTask* shared) {
  for (int t = static_cast<int>(threadIdx.x); t < merge.count; t += blockDim.x) {
    const DeviceTask& task = merge.tasks[t];
    FusedTask own{};
    own.weight = static_cast<float>(task.weight), own.factor = static_cast<float>(task.factor);
    if (merge.select == DeviceSelect::cuts) {
      const DeviceCut removed = merge.cuts[2 * t], kept = merge.cuts[2 * t + 1];
      own.kept_bits = static_cast<int32_t>(kept.bits), own.kept_end = kept.tie_end;
      own.removed_bits = static_cast<int32_t>(removed.bits), own.removed_end = removed.tie_end;
    }
    own.tuned = task.tuned.data, own.mask = task.mask, own.key = task.key, own.limit = task.limit;
    shared[t] = own;
  }
  __syncthreads();
}

// Entries of a vector that a mask or random words keep; tasks first .. first + count, 8 bits each.
template <int entries>
__device__ inline uint64_t kept_masks(const DeviceMerge& merge, const FusedTask* tasks, int first, int count, int64_t begin) {
  uint64_t masks = 0;
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    const FusedTask& task = tasks[first + t];
    uint32_t mask = 0xffu;
    if (merge.select == DeviceSelect::bits) {
      mask = task.mask[(begin - merge.first) / 8];
      if constexpr (entries == 4) mask >>= begin & 4;
    } else if (merge.select == DeviceSelect::dropout && task.limit < int64_t{1} << 32) {
      const auto bound = static_cast<uint32_t>(task.limit);
      mask = 0;
#pragma unroll
      for (int block = 0; block < entries / 4; ++block) {
        const PhiloxBlock random = philox_4x32_10(merge.seed, task.key, (static_cast<uint64_t>(begin) >> 2) + block);
#pragma unroll
        for (int word = 0; word < 4; ++word) mask |= (random.word[word] < bound ? 1u : 0u) << (4 * block + word);
      }
    }
    masks |= static_cast<uint64_t>(mask & 0xffu) << (8 * t);
  }
  return masks;
}

// Contributions by cuts. A tie ends inside of one vector of a tensor alone: for all others a cut is one comparison.
template <int entries>
__device__ inline void cut_parts(const FusedTask& task, int64_t begin, int32_t most, const float (&delta)[entries],
                                 float (&part)[entries]) {
  const float weight = task.weight, factor = task.factor;
  const uint32_t kept_ties = entries_before(begin, task.kept_end), removed_ties = entries_before(begin, task.removed_end);
  constexpr uint32_t all = (1u << entries) - 1u;
  const bool kept_whole = (kept_ties & all) == 0 || (kept_ties & all) == all;
  const bool removed_whole = (removed_ties & all) == 0 || (removed_ties & all) == all;
  if (kept_whole && removed_whole) {
    const int32_t kept = task.kept_bits - static_cast<int32_t>(kept_ties & 1u);
    const int32_t removed = task.removed_bits - static_cast<int32_t>(removed_ties & 1u);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const int32_t bits = magnitude_bits(delta[i], most);
      part[i] = weight * (factor * (bits > kept && bits <= removed ? delta[i] : 0.0f));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < entries; ++i) {
    const int32_t bits = magnitude_bits(delta[i], most);
    const bool keep = bits > task.kept_bits - static_cast<int32_t>(kept_ties >> i & 1u);
    const bool remove = bits > task.removed_bits - static_cast<int32_t>(removed_ties >> i & 1u);
    part[i] = weight * (factor * (keep && !remove ? delta[i] : 0.0f));
  }
}

template <int entries>
__device__ inline void masked_parts(const FusedTask& task, uint32_t mask, const float (&delta)[entries], float (&part)[entries]) {
  const float weight = task.weight, factor = task.factor;
#pragma unroll
  for (int i = 0; i < entries; ++i) part[i] = weight * (factor * (mask >> i & 1u ? delta[i] : 0.0f));
}

template <DType dtype>
__device__ inline void delta_of(const Vector<dtype>& tuned, const Vector<dtype>& base, bool has_base,
                                float (&delta)[Vector<dtype>::entries]) {
#pragma unroll
  for (int i = 0; i < Vector<dtype>::entries; ++i) delta[i] = has_base ? tuned.value(i) - base.value(i) : tuned.value(i);
}

// Writes base + scale * combined.
template <DType dtype>
__device__ inline void finish(const DeviceMerge& merge, int64_t vector, const Vector<dtype>& base,
                              const float (&combined)[Vector<dtype>::entries]) {
  Vector<dtype> out;
  const auto scale = static_cast<float>(merge.scale), divisor = static_cast<float>(merge.divisor);
#pragma unroll
  for (int i = 0; i < Vector<dtype>::entries; ++i) {
    const float mean = merge.combine == Combine::weighted_mean ? combined[i] / divisor : combined[i];
    const float value = scale * mean;
    out.set(i, merge.base.data != nullptr ? base.value(i) + value : value);
  }
  out.store(merge.out.data, vector);
}

enum class Kept { all, masks, cuts };

// Calls body(task, its contributions) for all tasks in order, several tasks' loads at a time.
template <DType dtype, Kept kind, class Body>
__device__ inline void for_each_part(const DeviceMerge& merge, const FusedTask* tasks, int64_t vector, const Vector<dtype>& base,
                                     Body body) {
  constexpr int entries = Vector<dtype>::entries;
  const bool has_base = merge.base.data != nullptr;
  const int32_t most = most_bits<float>(merge, merge.tasks[0]);
  for (int first = 0; first < merge.count; first += loaded_together) {
    Vector<dtype> tuned[loaded_together];
#pragma unroll
    for (int t = 0; t < loaded_together; ++t) {
      if (first + t < merge.count) tuned[t].load(tasks[first + t].tuned, vector);
    }
    uint64_t masks = 0;
    if constexpr (kind == Kept::masks) {
      masks = kept_masks<entries>(merge, tasks, first, min(loaded_together, merge.count - first), vector * entries);
    }
#pragma unroll
    for (int t = 0; t < loaded_together; ++t) {
      if (first + t >= merge.count) break;
      const FusedTask& task = tasks[first + t];
      float delta[entries], part[entries];
      delta_of(tuned[t], base, has_base, delta);
      if constexpr (kind == Kept::cuts) {
        cut_parts(task, vector * entries, most, delta, part);
      } else {
        masked_parts(task, kind == Kept::all ? 0xffu : static_cast<uint32_t>(masks >> (8 * t)), delta, part);
      }
      body(task, part);
    }
  }
}

template <DType dtype, Kept kind>
__global__ void __launch_bounds__(cuda_threads, 4) sum_kernel(DeviceMerge merge) {
  constexpr int entries = Vector<dtype>::entries;
  TASKLOOM_DYNAMIC_SHARED(FusedTask, tasks);
  share_tasks(merge, tasks);
  const int64_t last = merge.end / entries;
  for (int64_t vector = merge.begin / entries + grid_index(); vector < last; vector += grid_stride()) {
    Vector<dtype> base{};
    if (merge.base.data != nullptr) base.load(merge.base.data, vector);
    float combined[entries] = {};
    for_each_part<dtype, kind>(merge, tasks, vector, base, [&](const FusedTask&, const float (&part)[entries]) {
#pragma unroll
      for (int i = 0; i < entries; ++i) combined[i] += part[i];
    });
    finish(merge, vector, base, combined);
  }
}

__device__ inline void add_where(bool agrees, float part, float weight, float* combined, float* weight_sum) {
  if (!agrees) return;
  *combined += part;
  *weight_sum += weight;
}

__device__ inline float disjoint_mean(const DeviceMerge& merge, float combined, float weight_sum) {
  return merge.combine == Combine::disjoint_mean ? combined / (weight_sum == 0.0f ? 1.0f : weight_sum) : combined;
}

// Any number of tasks: once through them for the signs, once for the mean.
template <DType dtype, Kept kind>
__global__ void __launch_bounds__(cuda_threads, 2) elect_many_kernel(DeviceMerge merge) {
  constexpr int entries = Vector<dtype>::entries;
  TASKLOOM_DYNAMIC_SHARED(FusedTask, tasks);
  share_tasks(merge, tasks);
  const float zero = zero_is_positive(merge) ? 1.0f : -1.0f;
  const int64_t last = merge.end / entries;
  for (int64_t vector = merge.begin / entries + grid_index(); vector < last; vector += grid_stride()) {
    Vector<dtype> base{};
    if (merge.base.data != nullptr) base.load(merge.base.data, vector);
    float elected[entries] = {}, combined[entries] = {}, weight_sum[entries] = {};
    for_each_part<dtype, kind>(merge, tasks, vector, base, [&](const FusedTask&, const float (&part)[entries]) {
#pragma unroll
      for (int i = 0; i < entries; ++i) elected[i] += part[i];
    });
#pragma unroll
    for (int i = 0; i < entries; ++i) elected[i] = elected[i] > 0.0f ? 1.0f : elected[i] < 0.0f ? -1.0f : zero;
    for_each_part<dtype, kind>(merge, tasks, vector, base, [&](const FusedTask& task, const float (&part)[entries]) {
#pragma unroll
      for (int i = 0; i < entries; ++i) add_where(part[i] * elected[i] > 0.0f, part[i], task.weight, &combined[i], &weight_sum[i]);
    });
#pragma unroll
    for (int i = 0; i < entries; ++i) combined[i] = disjoint_mean(merge, combined[i], weight_sum[i]);
    finish(merge, vector, base, combined);
  }
}

// Up to `most` tasks, whose contributions stay in registers between the election and the mean.
template <DType dtype, Kept kind, int most>
__global__ void __launch_bounds__(cuda_threads, most > 4 ? 2 : 3) elect_few_kernel(DeviceMerge merge) {
  constexpr int entries = Vector<dtype>::entries;
  TASKLOOM_DYNAMIC_SHARED(FusedTask, tasks);
  share_tasks(merge, tasks);
  const bool has_base = merge.base.data != nullptr;
  const int32_t nan_bits = most_bits<float>(merge, merge.tasks[0]);
  const float zero = zero_is_positive(merge) ? 1.0f : -1.0f;
  const int64_t last = merge.end / entries;
  for (int64_t vector = merge.begin / entries + grid_index(); vector < last; vector += grid_stride()) {
    Vector<dtype> base{}, tuned[most];
    if (has_base) base.load(merge.base.data, vector);
#pragma unroll
    for (int t = 0; t < most; ++t) {
      if (t < merge.count) tuned[t].load(tasks[t].tuned, vector);
    }
    uint64_t masks = 0;
    if constexpr (kind == Kept::masks) masks = kept_masks<entries>(merge, tasks, 0, merge.count, vector * entries);
    float part[most][entries] = {};
#pragma unroll
    for (int t = 0; t < most; ++t) {
      if (t >= merge.count) continue;
      float delta[entries];
      delta_of(tuned[t], base, has_base, delta);
      if constexpr (kind == Kept::cuts) {
        cut_parts(tasks[t], vector * entries, nan_bits, delta, part[t]);
      } else {
        masked_parts(tasks[t], static_cast<uint32_t>(masks >> (8 * t)), delta, part[t]);
      }
    }
    float combined[entries];
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      float sum = 0.0f, total = 0.0f, weight_sum = 0.0f;
#pragma unroll
      for (int t = 0; t < most; ++t) sum += part[t][i];
      const float elected = sum > 0.0f ? 1.0f : sum < 0.0f ? -1.0f : zero;
#pragma unroll
      for (int t = 0; t < most; ++t) add_where(part[t][i] * elected > 0.0f, part[t][i], tasks[t].weight, &total, &weight_sum);
      combined[i] = disjoint_mean(merge, total, weight_sum);
    }
    finish(merge, vector, base, combined);
  }
}

template <class Kernel>
void launch_fused(const Tensor& where, const DeviceMerge& merge, int64_t entries, int64_t most_blocks, Kernel kernel) {
  const int64_t all = merge.end / entries - merge.begin / entries;
  const int64_t blocks = std::min(striding_blocks(where, all, cuda_threads), multiprocessor_count(where) * most_blocks);
  // A table of held tasks has a row for each that a thread could hold.
  const auto shared = static_cast<unsigned>(std::max(merge.count, most_held) * static_cast<int32_t>(sizeof(FusedTask)));
  launch(where, {dim3(static_cast<unsigned>(blocks)), cuda_threads, shared}, kernel, merge);
}

template <DType dtype, Kept kind>
void launch_kind(const Tensor& where, const DeviceMerge& merge) {
  constexpr int entries = Vector<dtype>::entries;
  if (merge.elect == Elect::none) {
    launch_fused(where, merge, entries, resident_blocks, sum_kernel<dtype, kind>);
    return;
  }
  if constexpr (kind != Kept::all) {
    if (merge.count <= 4) {
      launch_fused(where, merge, entries, resident_blocks, elect_few_kernel<dtype, kind, 4>);
    } else if (merge.count <= most_held) {
      launch_fused(where, merge, entries, resident_blocks, elect_few_kernel<dtype, kind, most_held>);
    } else {
      const int64_t bytes = cuda_threads * int64_t{16} * merge.count;
      launch_fused(where, merge, entries, std::clamp<int64_t>(cached_bytes / bytes, 2, resident_blocks), elect_many_kernel<dtype, kind>);
    }
  }
}

template <DType dtype>
void launch_dtype(const Tensor& where, const DeviceMerge& merge) {
  if (merge.select == DeviceSelect::cuts) {
    launch_kind<dtype, Kept::cuts>(where, merge);
  } else if (merge.select == DeviceSelect::all && merge.elect == Elect::none) {
    launch_kind<dtype, Kept::all>(where, merge);
  } else {
    launch_kind<dtype, Kept::masks>(where, merge);
  }
}

bool serves(const DeviceMerge& merge) {
  const bool sums = merge.elect == Elect::none && merge.combine != Combine::disjoint_mean;
  return (sums || merge.elect == Elect::sign_sum) && merge.vote == Vote::none && merge.select != DeviceSelect::multipliers &&
         merge.count <= most_tasks;
}

}  // namespace

int64_t merge_fused(const Tensor& where, const DeviceMerge& merge, bool alike) {
  if (!alike || !serves(merge)) return merge.begin;
  DeviceMerge whole = merge;
  whole.end = merge.end / vector_entries * vector_entries;
  switch (merge.out.dtype) {
    case DType::f32:
      launch_dtype<DType::f32>(where, whole);
      break;
    case DType::f16:
      launch_dtype<DType::f16>(where, whole);
      break;
    case DType::bf16:
      launch_dtype<DType::bf16>(where, whole);
      break;
    default:
      return merge.begin;
  }
  return whole.end;
}

}  // namespace taskloom
