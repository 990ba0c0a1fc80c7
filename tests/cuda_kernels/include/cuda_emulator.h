// Runs CUDA kernels on the CPU, one block at a time, each thread of a block on a stack of its own. What it is for: the kernels' logic on a
// machine without a GPU. A kernel that would deadlock or diverge at a barrier is an error here. It knows nothing of caches, alignment
// faults or timing, and threads only change over where they wait, so it does not replace a run on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned in_x = 1, unsigned in_y = 1, unsigned in_z = 1) : x(in_x), y(in_y), z(in_z) {}
};

namespace cuda_emulator {

enum class Order : int { forward, reverse, shuffled };

constexpr unsigned warp_lanes = 32;

struct Body {
  void (*call)(void*);
  void* argument;
};

// Runs every thread of every block; throws std::runtime_error where threads wait for each other for ever.
void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Body body);

template <class Call>
void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Call call) {
  run(grid, block, dynamic_shared_bytes, Body{[](void* argument) { (*static_cast<Call*>(argument))(); }, &call});
}

// Of the thread that runs now.
uint3 thread_index();
uint3 block_index();
dim3 grid_size();
dim3 block_size();

void* dynamic_shared();
// Memory of the block under one key, the same for all its threads, filled with set bits when the block first asks for it.
void* shared(const void* key, size_t bytes);

void block_barrier();
// The sum of all threads' values, after a barrier.
int64_t block_sum(int64_t value);
// Each lane of the thread's warp gives a value; all lanes' values, once each has given its own.
const uint64_t* warp_exchange(uint64_t value);

}  // namespace cuda_emulator
