// Scratch of one thread, kept for its next chunk: fresh pages cost more than the work done on them.
#pragma once

#include <cstdint>

namespace taskloom {

// Buffers that a thread may hold at the same time.
enum class ScratchUse : int { stages, output, magnitudes, sorted_copy, logits, weight, positions, count };

// What is above this is given back after each use: it must not stay with every thread that once met a long row.
constexpr int64_t most_kept_scratch = 16 << 20;

// `bytes` of the calling thread's scratch, at an address that suits any vector, while this lives. One at a time of each use.
class ThreadScratch {
 public:
  ThreadScratch(ScratchUse use, int64_t bytes);
  ~ThreadScratch();
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;

  char* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  ScratchUse use_;
  char* data_;
};

}  // namespace taskloom
