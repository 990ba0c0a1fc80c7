// mask_count: in how many of T packed masks each entry is set, without unpacking them. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace taskloom {

constexpr int64_t mask_count_limit = int64_t{1} << 20;  // tasks; fewer than this

struct MaskCountLoops {
  // Entries begin .. begin + n (begin a multiple of 8): the whole mask `packed` of entries set in at least k of the masks, and
  // histogram[c] += entries that are set in c masks, for c = 0 .. tasks.
  void (*count)(const uint8_t* const* masks, int64_t tasks, int64_t k, int64_t begin, int64_t n, uint8_t* packed, int64_t* histogram);
};

TASKLOOM_LOOPS(MaskCountLoops, mask_count_loops)

}  // namespace taskloom
