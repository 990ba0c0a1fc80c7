// A parallel-for that the caller brings: torch's in an op, the executor's own threads in a merge. Torch-free.
#pragma once

#include <cstdint>

namespace taskloom {

struct ParallelFor {
  using Body = void (*)(int64_t index, void* argument);
  // Calls body(index, argument) once for each 0 <= index < count, in any order, and returns when all are done.
  void (*run)(void* context, int64_t count, Body body, void* argument);
  void* context;

  template <class F>
  void operator()(int64_t count, const F& body) const {
    if (count == 1) {
      body(0);
      return;
    }
    run(
        context, count, [](int64_t index, void* argument) { (*static_cast<const F*>(argument))(index); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

inline int64_t chunk_count(int64_t total, int64_t chunk) { return (total + chunk - 1) / chunk; }

}  // namespace taskloom
