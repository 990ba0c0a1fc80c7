// Survives SIGBUS in mapped files: the page that cannot be read, and all after it, become zeros, and the range is marked as failed.
#pragma once

#include <atomic>
#include <cstdint>

namespace taskloom {

struct MappedRange {
  std::atomic<uintptr_t> begin{0};  // 0 where the slot is free
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> failed{false};
};

// Watches a mapping until it is given back, which must come before its munmap. While any mapping is watched the process has a SIGBUS
// handler, which passes on every other SIGBUS to the handler that was there.
MappedRange* watch_mapping(const void* begin, int64_t bytes);
void release_mapping(MappedRange* range);

}  // namespace taskloom
