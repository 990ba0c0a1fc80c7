#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "fiber.h"

// Keeps what a call preserves on the stack that is left, and takes it from the one that goes on.
#ifdef __x86_64__
asm(R"(
.text
.globl taskloom_emulator_switch
.hidden taskloom_emulator_switch
.type taskloom_emulator_switch, @function
taskloom_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace cuda_emulator {
namespace {

constexpr size_t dynamic_shared_room = 1 << 18;
constexpr int poison = 0xff;

enum class State { ready, at_block_barrier, at_warp, done };

struct Thread {
  Context context;
  std::unique_ptr<Stack> stack = std::make_unique<Stack>();
  State state = State::done;
  uint3 index{};
  unsigned warp = 0, lane = 0;
};

struct Warp {
  uint64_t values[2][warp_lanes] = {};
  unsigned waiting = 0;
  unsigned round = 0;
};

struct SharedArray {
  std::vector<max_align_t> memory;
  bool fresh = true;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<const void*, SharedArray> arrays;
  std::vector<max_align_t> dynamic_shared = std::vector<max_align_t>(dynamic_shared_room / sizeof(max_align_t));
  Context scheduler;
  Thread* current = nullptr;
  Body body{};
  dim3 grid, block;
  uint3 block_index{};
  int64_t block_sums[2] = {};
  unsigned barrier_round = 0;
  bool running = false;
};

Order order = Order::forward;

Machine& machine() {
  static thread_local Machine instance;
  return instance;
}

void thread_main() {
  Machine& m = machine();
  m.body.call(m.body.argument);
  m.current->state = State::done;
  change(&m.current->context, m.scheduler);
}

void wait(State state) {
  Machine& m = machine();
  m.current->state = state;
  change(&m.current->context, m.scheduler);
}

std::vector<size_t> in_order(size_t count, uint64_t salt) {
  std::vector<size_t> places(count);
  for (size_t i = 0; i < count; ++i) places[i] = order == Order::reverse ? count - 1 - i : i;
  if (order == Order::shuffled) std::shuffle(places.begin(), places.end(), std::mt19937_64(salt + 1));
  return places;
}

void start_threads(Machine* m) {
  const unsigned count = m->block.x * m->block.y * m->block.z;
  if (count == 0 || count > 1024 || count % warp_lanes != 0) {
    throw std::runtime_error("cuda emulator: expected blocks of whole warps and at most 1024 threads, got " + std::to_string(count));
  }
  m->threads.resize(std::max<size_t>(m->threads.size(), count));
  m->warps.assign(count / warp_lanes, Warp{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = m->threads[i];
    thread.index = {i % m->block.x, i / m->block.x % m->block.y, i / (m->block.x * m->block.y)};
    thread.warp = i / warp_lanes;
    thread.lane = i % warp_lanes;
    thread.state = State::ready;
    prepare(&thread.context, *thread.stack, thread_main);
  }
  for (auto& [key, array] : m->arrays) array.fresh = true;
  std::fill_n(reinterpret_cast<unsigned char*>(m->dynamic_shared.data()), dynamic_shared_room, poison);
  m->barrier_round = 0;
  m->block_sums[0] = m->block_sums[1] = 0;
}

// Lets all threads go that wait at the barrier of the block; false where they do not all stand there.
bool pass_block_barrier(Machine* m, unsigned count) {
  unsigned waiting = 0;
  for (unsigned i = 0; i < count; ++i) waiting += m->threads[i].state == State::at_block_barrier;
  if (waiting != count) return false;
  ++m->barrier_round;
  m->block_sums[m->barrier_round % 2] = 0;
  for (unsigned i = 0; i < count; ++i) m->threads[i].state = State::ready;
  return true;
}

void run_block(Machine* m) {
  start_threads(m);
  const unsigned count = m->block.x * m->block.y * m->block.z;
  const uint64_t salt = m->block_index.x + 1000003ull * m->block_index.y;
  for (uint64_t pass = 0;; ++pass) {
    bool ran = false;
    for (const size_t place : in_order(count, salt + pass)) {
      Thread& thread = m->threads[place];
      if (thread.state != State::ready) continue;
      ran = true;
      m->current = &thread;
      change(&m->scheduler, thread.context);
    }
    if (ran) continue;
    unsigned done = 0;
    for (unsigned i = 0; i < count; ++i) done += m->threads[i].state == State::done;
    if (done == count) return;
    if (!pass_block_barrier(m, count)) {
      throw std::runtime_error("cuda emulator: threads of one block wait for each other at different barriers, or for threads that ended");
    }
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Body body) {
  Machine& m = machine();
  if (m.running) throw std::runtime_error("cuda emulator: a kernel was launched within a kernel");
  if (dynamic_shared_bytes > dynamic_shared_room) throw std::runtime_error("cuda emulator: more dynamic shared memory than a GPU has");
  struct Running {
    bool* flag;
    ~Running() { *flag = false; }
  } const running{&m.running};
  m.running = true;
  m.grid = grid;
  m.block = block;
  m.body = body;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  for (const size_t index : in_order(blocks, blocks)) {
    m.block_index = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                     static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(&m);
  }
}

uint3 thread_index() { return machine().current->index; }
uint3 block_index() { return machine().block_index; }
dim3 grid_size() { return machine().grid; }
dim3 block_size() { return machine().block; }
void* dynamic_shared() { return machine().dynamic_shared.data(); }

void* shared(const void* key, size_t bytes) {
  SharedArray& array = machine().arrays[key];
  if (array.fresh) {
    array.memory.resize((bytes + sizeof(max_align_t) - 1) / sizeof(max_align_t));
    std::fill_n(reinterpret_cast<unsigned char*>(array.memory.data()), bytes, poison);
    array.fresh = false;
  }
  return array.memory.data();
}

void block_barrier() { wait(State::at_block_barrier); }

int64_t block_sum(int64_t value) {
  Machine& m = machine();
  const unsigned round = m.barrier_round;
  m.block_sums[round % 2] += value;
  block_barrier();
  return m.block_sums[round % 2];
}

const uint64_t* warp_exchange(uint64_t value) {
  Machine& m = machine();
  Thread& thread = *m.current;
  Warp& warp = m.warps[thread.warp];
  // Two sets of values: a lane that runs ahead writes the next while others still read these.
  uint64_t* const values = warp.values[warp.round % 2];
  values[thread.lane] = value;
  if (++warp.waiting < warp_lanes) {
    wait(State::at_warp);
    return values;
  }
  warp.waiting = 0;
  ++warp.round;
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    Thread& other = m.threads[thread.warp * warp_lanes + lane];
    if (other.state == State::at_warp) other.state = State::ready;
  }
  return values;
}

}  // namespace cuda_emulator

extern "C" __attribute__((visibility("default"))) void taskloom_emulator_order(int order) {
  cuda_emulator::order = static_cast<cuda_emulator::Order>(order);
}
