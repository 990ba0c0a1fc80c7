// What the executor allocates for a merge: the same functions that size its buffers add them up, before any work is done.
#pragma once

#include <cstdint>
#include <vector>

#include "merge/executor.h"

namespace taskloom {

class MemoryAccount {
 public:
  // Reads sizes, dtypes and stages; no file is opened.
  MemoryAccount(const std::vector<MergeJob>& jobs, bool magnitude_histogram);
  // The most bytes of memory that the merge takes with so many threads and so much room between passes, Python's side left out.
  int64_t needed(int threads, int64_t room) const;
  // The least room with which this many threads can work.
  static int64_t least_room(int threads);

 private:
  struct Tensor {
    SparseMerge merge;              // without tasks for a copy
    bool histogram = false;         // magnitudes are counted for plots
    bool model_scope = false;       // or for thresholds of the whole model
    int64_t converted_scratch = 0;  // of a copy to another dtype
  };
  std::vector<Tensor> tensors_;
  int64_t plan_ = 0;
};

}  // namespace taskloom
