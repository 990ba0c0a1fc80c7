// The executor's own threads: a parallel-for over an index range, the calling thread included. A call from inside a worker runs in place.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

#include "common/parallel.h"

namespace taskloom {

// Of each thread's stack, which no loop needs much of; the system's usual 8 MiB would count against limits of address space.
constexpr int64_t worker_stack_bytes = 1 << 20;

class ThreadPool {
 public:
  // `tick` is called on the calling thread after each of its items; what it throws stops the loop.
  ThreadPool(int threads, std::function<void()> tick);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ParallelFor parallel() { return {&ThreadPool::run_in, this}; }

 private:
  static void run_in(void* context, int64_t count, ParallelFor::Body body, void* argument);
  void run(int64_t count, ParallelFor::Body body, void* argument);
  static void* start(void* pool);
  void work();
  void take_items(bool caller);

  std::function<void()> tick_;
  std::vector<pthread_t> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  uint64_t generation_ = 0;
  int busy_ = 0;
  bool stop_ = false;
  ParallelFor::Body body_ = nullptr;
  void* argument_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
};

}  // namespace taskloom
