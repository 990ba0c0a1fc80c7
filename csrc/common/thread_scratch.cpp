#include "common/thread_scratch.h"

#include "common/page_buffer.h"

namespace taskloom {
namespace {

PageBuffer& buffer_of(ScratchUse use) {
  thread_local PageBuffer buffers[static_cast<int>(ScratchUse::count)];
  return buffers[static_cast<int>(use)];
}

}  // namespace

ThreadScratch::ThreadScratch(ScratchUse use, int64_t bytes) : use_(use) {
  PageBuffer& buffer = buffer_of(use);
  if (buffer.bytes() < bytes) {
    buffer = PageBuffer();
    buffer = PageBuffer(bytes);
  }
  data_ = buffer.data();
}

ThreadScratch::~ThreadScratch() {
  PageBuffer& buffer = buffer_of(use_);
  if (buffer.bytes() > most_kept_scratch) buffer = PageBuffer();
}

}  // namespace taskloom
