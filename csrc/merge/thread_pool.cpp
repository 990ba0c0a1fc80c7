#include "merge/thread_pool.h"

#include <utility>

namespace taskloom {
namespace {

thread_local bool inside = false;

}  // namespace

ThreadPool::ThreadPool(int threads, std::function<void()> tick) : tick_(std::move(tick)) {
  workers_.reserve(static_cast<size_t>(threads));
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return;
  // Where the system wants larger stacks than this, they are of its usual size.
  (void)pthread_attr_setstacksize(&attributes, static_cast<size_t>(worker_stack_bytes));
  for (int i = 1; i < threads; ++i) {
    pthread_t worker;
    if (pthread_create(&worker, &attributes, &ThreadPool::start, this) != 0) {
      break;  // The system has no more threads to give; the work is the same with fewer.
    }
    workers_.push_back(worker);
  }
  pthread_attr_destroy(&attributes);
}

void* ThreadPool::start(void* pool) {
  static_cast<ThreadPool*>(pool)->work();
  return nullptr;
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (const pthread_t worker : workers_) pthread_join(worker, nullptr);
}

void ThreadPool::run_in(void* context, int64_t count, ParallelFor::Body body, void* argument) {
  auto* pool = static_cast<ThreadPool*>(context);
  if (!inside) {
    pool->run(count, body, argument);
    return;
  }
  for (int64_t i = 0; i < count; ++i) body(i, argument);
}

void ThreadPool::run(int64_t count, ParallelFor::Body body, void* argument) {
  {
    const std::lock_guard lock(mutex_);
    body_ = body;
    argument_ = argument;
    count_ = count;
    next_ = 0;
    error_ = nullptr;
    busy_ = static_cast<int>(workers_.size());
    ++generation_;
  }
  wake_.notify_all();
  inside = true;
  take_items(true);
  inside = false;
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::take_items(bool caller) {
  try {
    for (int64_t i = next_++; i < count_; i = next_++) {
      body_(i, argument_);
      if (caller && tick_) tick_();
    }
  } catch (...) {
    next_ = count_;
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::work() {
  inside = true;
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
    if (stop_) return;
    seen = generation_;
    lock.unlock();
    take_items(false);
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace taskloom
