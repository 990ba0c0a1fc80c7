// masked_update: target + scale * delta at the entries that a mask sets; the bits of the others do not change. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

struct MaskedUpdate {
  Elements target, delta;
  const uint8_t* mask;  // packed, or a byte an entry
  bool packed;
  double scale;
  void* out;  // of target's dtype; may be target
};

struct MaskedUpdateLoops {
  // Entries begin .. begin + n (begin a multiple of 8); `wide` computes in double.
  void (*update)(bool wide, const MaskedUpdate& update, int64_t begin, int64_t n);
};

TASKLOOM_LOOPS(MaskedUpdateLoops, masked_update_loops)

}  // namespace taskloom
