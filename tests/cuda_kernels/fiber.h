// Stacks that one host thread changes between. glibc's swapcontext asks the kernel for the signal mask at every change, which takes most
// of the time of an emulated kernel.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_emulator {

constexpr size_t stack_bytes = 1 << 17;

class Stack {
 public:
  Stack() : memory_(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::runtime_error("cuda emulator: no memory for a thread's stack");
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(memory_, stack_bytes); }
  void* memory() const { return memory_; }

 private:
  void* memory_;
};

#ifdef __x86_64__

extern "C" void taskloom_emulator_switch(void** from, void* to);

// Where a stack was left: what a call preserves lies on it.
struct Context {
  void* top = nullptr;
};

inline void change(Context* from, const Context& to) { taskloom_emulator_switch(&from->top, to.top); }

// `entry` must not return.
inline void prepare(Context* context, const Stack& stack, void (*entry)()) {
  auto* word = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack.memory()) + stack_bytes);
  // Above the return address there is one more word, as after a call.
  *--word = 0;
  *--word = reinterpret_cast<uintptr_t>(entry);
  for (int preserved = 0; preserved < 6; ++preserved) *--word = 0;
  context->top = word;
}

#else

struct Context {
  ucontext_t saved;
};

inline void change(Context* from, const Context& to) { swapcontext(&from->saved, &to.saved); }

inline void prepare(Context* context, const Stack& stack, void (*entry)()) {
  getcontext(&context->saved);
  context->saved.uc_stack.ss_sp = stack.memory();
  context->saved.uc_stack.ss_size = stack_bytes;
  context->saved.uc_link = nullptr;
  makecontext(&context->saved, entry, 0);
}

#endif

}  // namespace cuda_emulator
