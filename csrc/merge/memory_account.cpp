#include "merge/memory_account.h"

#include <algorithm>

#include "merge/thread_pool.h"

namespace taskloom {
namespace {

constexpr int uses = static_cast<int>(ScratchUse::count);
// A thread's own heap, from which it takes what is small, and the system's records of it.
constexpr int64_t thread_heap = 640 << 10;
// What is small for a tensor while it is merged, for each task: copies of its settings, thresholds, ranks.
constexpr int64_t task_bytes = 1 << 10;
constexpr int64_t page = 4096;
constexpr int output = static_cast<int>(ScratchUse::output);

int64_t in_pages(int64_t bytes) { return (bytes + page - 1) / page * page + 4 * page; }

// A histogram with the private ones that are added to it, and counts of ties by chunks.
int64_t histograms(int64_t numel, int64_t room) {
  return least_threshold_room + histogram_memory(numel, room - least_threshold_room) + numel / 1024;
}

int64_t plan_bytes(const MergeJob& job) {
  const auto tasks = static_cast<int64_t>(job.tuned.size());
  // The job, its merge when it is prepared, and its statistics; heap blocks have a header.
  int64_t bytes = sizeof(MergeJob) + sizeof(std::optional<SparseMerge>) + sizeof(JobResult) + 16 * sizeof(int64_t);
  bytes += static_cast<int64_t>(job.name.size()) + tasks * static_cast<int64_t>(sizeof(Place));
  if (!job.stages) return bytes;
  const bool held = job.stages->model_scope || job.stages->zero_majority;
  bytes += (held ? 2 : 1) * tasks * static_cast<int64_t>(sizeof(MergeTask));
  // Segments and ends of ties of a threshold of the whole model.
  if (job.stages->model_scope) bytes += static_cast<int64_t>(sizeof(DeltaSegment)) + 4 * static_cast<int64_t>(sizeof(int64_t));
  return bytes + tasks * static_cast<int64_t>(sizeof(int64_t)) + tasks * (tasks + 1) / 2 * static_cast<int64_t>(sizeof(double));
}

// What a slerp merges: the base and the model, as two tensors' values.
SparseMerge line_of(const MergeJob& job) {
  SparseMerge merge = sized_merge(job);
  MergeTask base = merge.tasks.front();
  base.dtype = merge.base_dtype;
  merge.tasks.push_back(base);
  return merge;
}

}  // namespace

int64_t MemoryAccount::least_room(int threads) { return threads * least_threshold_room; }

MemoryAccount::MemoryAccount(const std::vector<MergeJob>& jobs, bool magnitude_histogram) {
  for (const MergeJob& job : jobs) {
    plan_ += plan_bytes(job);
    Tensor tensor;
    if (job.stages && job.numel > 0) {
      tensor.merge = job.stages->slerp ? line_of(job) : sized_merge(job);
      tensor.histogram = magnitude_histogram;
      tensor.model_scope = job.stages->model_scope;
    } else if (!job.stages && job.floating && job.base->dtype != job.target.dtype) {
      tensor.merge.numel = job.numel;
      tensor.converted_scratch = convert_scratch(job.numel, job.target.dtype);
    } else {
      continue;
    }
    tensors_.push_back(std::move(tensor));
  }
}

int64_t MemoryAccount::needed(int threads, int64_t room) const {
  int64_t kept[uses] = {};
  int64_t most = 0;  // at any one time, besides what threads keep
  for (const Tensor& tensor : tensors_) {
    SparseMerge merge = tensor.merge;
    merge.room = room_of(merge.numel, threads, room);
    MergeMemory memory;
    memory.scratch[output] = tensor.converted_scratch;
    if (!merge.tasks.empty()) memory = merge_memory(merge);
    if (tensor.histogram) memory.shared = std::max(memory.shared, histograms(merge.numel, merge.room));
    if (tensor.model_scope) most = std::max(most, histograms(merge.numel, room));
    const bool few = merge.numel < large_tensor;
    const int64_t workers = few ? 1 : std::clamp<int64_t>(memory.chunks, 1, threads);
    int64_t own = in_pages(memory.shared) + memory.totals + task_bytes * static_cast<int64_t>(merge.tasks.size());
    for (int use = 0; use < uses; ++use) {
      const int64_t bytes = in_pages(memory.scratch[use]);
      if (bytes > most_kept_scratch) {
        own += workers * bytes;
      } else {
        kept[use] = std::max(kept[use], bytes);
      }
    }
    most = std::max(most, few ? threads * own : own);
  }
  int64_t of_thread = worker_stack_bytes + thread_heap;
  for (const int64_t bytes : kept) of_thread += bytes;
  return plan_ + threads * of_thread + most;
}

}  // namespace taskloom
