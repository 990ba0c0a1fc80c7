// Ways to run a loop over chunks: on the calling thread, or on a pool of more threads than this machine has cores.
#pragma once

#include "merge/thread_pool.h"

namespace taskloom::sanitize {

inline ParallelFor serial() {
  return {[](void*, int64_t count, ParallelFor::Body body, void* argument) {
            for (int64_t i = 0; i < count; ++i) body(i, argument);
          },
          nullptr};
}

inline ParallelFor team() {
  static ThreadPool pool(5, {});
  return pool.parallel();
}

}  // namespace taskloom::sanitize
