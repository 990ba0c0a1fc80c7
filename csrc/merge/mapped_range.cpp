#include "merge/mapped_range.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <mutex>

namespace taskloom {
namespace {

// The handler walks these while other threads add to them, so blocks are only ever added, never moved or freed.
struct Block {
  std::array<MappedRange, 64> ranges;
  std::atomic<Block*> next{nullptr};
};

Block first_block;
std::mutex mutex;
int watched = 0;
struct sigaction previous_action{};

MappedRange* find_range(uintptr_t address) {
  for (Block* block = &first_block; block != nullptr; block = block->next.load(std::memory_order_acquire)) {
    for (MappedRange& range : block->ranges) {
      const uintptr_t begin = range.begin.load(std::memory_order_acquire);
      if (begin != 0 && address >= begin && address < range.end.load(std::memory_order_acquire)) return &range;
    }
  }
  return nullptr;
}

bool replace_by_zeros(MappedRange* range, uintptr_t address) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = address / page * page;
  range->failed.store(true, std::memory_order_release);
  return ::mmap(reinterpret_cast<void*>(begin), range->end.load(std::memory_order_acquire) - begin, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if ((previous_action.sa_flags & SA_SIGINFO) != 0 && previous_action.sa_sigaction != nullptr) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
  } else {
    // Back in the program the access faults again, now with the default action, which ends the process as it would have been.
    ::signal(signal, SIG_DFL);
  }
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int saved = errno;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  MappedRange* range = find_range(address);
  if (range == nullptr || !replace_by_zeros(range, address)) pass_on(signal, info, context);
  errno = saved;
}

MappedRange* take_slot() {
  for (Block* block = &first_block;; block = block->next) {
    for (MappedRange& range : block->ranges) {
      if (range.begin.load() == 0) return &range;
    }
    if (block->next.load() == nullptr) block->next.store(new Block, std::memory_order_release);
  }
}

}  // namespace

MappedRange* watch_mapping(const void* begin, int64_t bytes) {
  const std::lock_guard lock(mutex);
  MappedRange* range = take_slot();
  range->failed.store(false);
  range->end.store(reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes), std::memory_order_release);
  range->begin.store(reinterpret_cast<uintptr_t>(begin), std::memory_order_release);
  if (watched++ == 0) {
    struct sigaction action{};
    action.sa_sigaction = &on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, &previous_action);
  }
  return range;
}

void release_mapping(MappedRange* range) {
  const std::lock_guard lock(mutex);
  range->begin.store(0, std::memory_order_release);
  if (--watched > 0) return;
  struct sigaction current{};
  ::sigaction(SIGBUS, nullptr, &current);
  // Somebody may have put a handler of their own on top of this one meanwhile; theirs stays.
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == &on_sigbus) ::sigaction(SIGBUS, &previous_action, nullptr);
}

}  // namespace taskloom
