// masked_switch_: from base + delta at the entries of one packed mask to the same at another's, touching only what changes. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

struct MaskedSwitch {
  Elements base, delta;
  const uint8_t *old_packed, *new_packed;
  void* target;  // shares no memory with base and delta
  DType target_dtype;
};

struct MaskedSwitchLoops {
  // Entries begin .. begin + n (begin a multiple of 8); `wide` computes in double.
  void (*change)(bool wide, const MaskedSwitch& change, int64_t begin, int64_t n);
};

TASKLOOM_LOOPS(MaskedSwitchLoops, masked_switch_loops)

}  // namespace taskloom
