// Drives the torch-free C++ under the sanitizers. Ends with status 0 and the number of cases, or with a report and another status.
//   taskloom_sanitize [GROUP ...]      runs these groups, or all
//   taskloom_sanitize --defect NAME    does what a sanitizer must report
#include <sanitizer/common_interface_defs.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"
#include "groups.h"

namespace taskloom::sanitize {
namespace {

struct Group {
  const char* name;
  void (*run)();
  bool threaded;  // what has one thread only is not worth ThreadSanitizer's time
};

#ifdef __SANITIZE_THREAD__
constexpr bool only_threaded = true;
#else
constexpr bool only_threaded = false;
#endif

constexpr Group groups[] = {
    {"packed_mask", packed_masks, false},
    {"mask_count", mask_counts, false},
    {"masked_update", masked_updates, false},
    {"masked_switch", masked_switches, false},
    {"masked_compress", masked_compressions, false},
    {"task_mask", task_masks, false},
    {"block_scale_merge", block_scales, false},
    {"weighted_ce", logit_tiles, false},
    {"kernel_merge", kernel_merges, false},
    {"kernel_ranks", kernel_ranks, true},
    {"lowrank_merge", lowrank_merges, true},
    {"rmm_fit", rmm_fits, true},
    {"topk_gate", gates, true},
    {"window_conv2d", window_convolutions, true},
    {"window_layer_norm", window_layer_norms, true},
    {"window_group_norm", window_group_norms, true},
    {"channel_scale", channel_scales, true},
    {"run_sums", run_sums, false},
    {"expert_sort", expert_sorts, true},
    {"expert_rows", expert_rows, true},
    {"threshold_loops", magnitude_loops, false},
    {"magnitude_threshold", magnitude_drivers, true},
    {"magnitude_mask", magnitude_masks, true},
    {"convert", conversions, false},
    {"philox", philox, false},
    {"sparse_merge", sparse_merges, false},
    {"sparse_merge_chunks", sparse_merge_chunks, true},
    {"thread_pool", thread_pools, true},
    {"merge", merges, true},
};

void tell_case() { std::fprintf(stderr, "  in case: %s\n", case_name); }

// UndefinedBehaviorSanitizer aborts, past the callback that the others have.
void tell_case_of_abort(int) { tell_case(); }

bool asked_for(const char* name, int count, char** names) {
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(names[i], name) == 0) return true;
  }
  return count == 0;
}

bool known(const char* name) {
  for (const Group& group : groups) {
    if (std::strcmp(group.name, name) == 0) return true;
  }
  return false;
}

int run_groups(int count, char** names) {
  for (int i = 0; i < count; ++i) {
    if (!known(names[i])) {
      std::fprintf(stderr, "unknown group '%s'\n", names[i]);
      return 2;
    }
  }
  std::string list;
  for (const std::string& level : levels()) list += (list.empty() ? "" : ", ") + level;
  std::printf("levels: %s\n", list.c_str());
  for (const Group& group : groups) {
    if (!asked_for(group.name, count, names) || (count == 0 && only_threaded && !group.threaded)) continue;
    const int64_t before = case_count;
    const auto start = std::chrono::steady_clock::now();
    group.run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-20s %7ld cases %7.1f s\n", group.name, case_count - before, seconds);
    std::fflush(stdout);
  }
  std::printf("%-20s %7ld cases\n", "all", case_count);
  return 0;
}

}  // namespace
}  // namespace taskloom::sanitize

extern "C" {

const char* __asan_default_options() { return "halt_on_error=1:detect_leaks=1:detect_stack_use_after_return=1"; }
const char* __ubsan_default_options() { return "halt_on_error=1:print_stacktrace=1:abort_on_error=1"; }
const char* __tsan_default_options() { return "halt_on_error=1"; }
}

int main(int argc, char** argv) {
  using namespace taskloom::sanitize;
  __sanitizer_set_death_callback(tell_case);
  std::signal(SIGABRT, tell_case_of_abort);
  try {
    if (argc == 3 && std::strcmp(argv[1], "--defect") == 0) {
      seeded_defect(argv[2]);
      std::printf("defect '%s': nobody noticed\n", argv[2]);
      return 0;
    }
    return run_groups(argc - 1, argv + 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n  in case: %s\n", error.what(), case_name);
    return 1;
  }
}
