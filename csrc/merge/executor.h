// The streaming merge: a planned list of tensors, read from mapped files (or memory), merged by the loops of sparse_merge and written in
// place. Needs no torch and no Python; python/taskloom/merge/plan.py explains the fields.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "masked/sparse_merge.h"
#include "merge/files.h"

namespace taskloom {

struct Place {
  int file = 0;
  int64_t offset = 0;
  DType dtype = DType::f32;
};

struct JobStages {
  SparseMerge merge;  // with everything but pointers, sizes and thresholds
  bool model_scope = false;
  bool zero_majority = false;
  bool slerp = false;
  double t = 0;
};

struct MergeJob {
  std::string name;
  int64_t numel = 0;
  int64_t bytes = 0;  // of a plain copy
  bool floating = true;
  Place target;
  std::optional<Place> base;
  std::vector<Place> tuned;
  std::optional<JobStages> stages;
};

// A job's merge without its tensors: everything that its buffers' sizes depend on.
SparseMerge sized_merge(const MergeJob& job);

// Tensors below this share the threads among them; larger ones are each spread over all threads.
constexpr int64_t large_tensor = 1 << 20;

// The room of one tensor's merge, of a run's.
int64_t room_of(int64_t numel, int threads, int64_t room);

struct JobResult {
  MergeStatistics statistics;
  std::vector<std::vector<int64_t>> histogram;  // per task, by exponent of |delta| in float32
  double seconds = 0;
};

struct MergeRun {
  std::vector<InputFile> inputs;
  std::vector<OutputFile> outputs;
  std::vector<MergeJob> jobs;
  std::vector<std::string> models;
  bool allow_nonfinite = false;
  bool magnitude_histogram = false;
  int threads = 1;
  int64_t room = default_room;  // bytes kept between passes, of all tensors in work together
};

// Called from the calling thread, after each of its chunks, with the bytes of all runs so far.
using Progress = std::function<void(int64_t done_bytes)>;

// Carries a merge out, one output file at a time, in any order and as many of them as are wanted. What concerns the whole model (the cuts
// of `scope: model`, the majority sign) is found by the first run, from all jobs, so that a file's content does not depend on which others
// are made.
class MergeExecutor {
 public:
  explicit MergeExecutor(MergeRun run);
  ~MergeExecutor();
  // Creates output files with their room on the disk and their headers: a full disk shows before anything is merged.
  void reserve(const std::vector<size_t>& outputs) const;
  // Merges the jobs of one output into it; results in the order of `jobs_of`.
  std::vector<JobResult> run(size_t output, const Progress& progress);
  // Indices of an output's jobs, in plan order.
  const std::vector<size_t>& jobs_of(size_t output) const;
  const MergeRun& plan() const;

 private:
  class State;
  std::unique_ptr<State> state_;
};

}  // namespace taskloom
