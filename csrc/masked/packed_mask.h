// Bit-packed masks: uint8, least significant bit first, tail bits zero. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace taskloom {

struct PackedMaskLoops {
  // n entries of a byte mask (0 is unset) from entry 0 of `mask` into (n + 7) / 8 bytes, and back to 0 or 1.
  void (*pack)(const uint8_t* mask, int64_t n, uint8_t* packed);
  void (*unpack)(const uint8_t* packed, int64_t n, uint8_t* mask);
};

TASKLOOM_LOOPS(PackedMaskLoops, packed_mask_loops)

}  // namespace taskloom
