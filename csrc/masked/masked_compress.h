// masked_compress, masked_restore: the entries of a tensor that a packed mask sets, next to each other, and back. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace taskloom {

// Entries begin .. begin + n of the whole arrays, begin a multiple of 8; elements are moved as `size` = 1, 2, 4 or 8 bytes.
struct MaskedCompressLoops {
  int64_t (*count)(const uint8_t* packed, int64_t begin, int64_t n);
  // The set entries to elements `place`, `place` + 1, .. of `out`.
  void (*compress)(int64_t size, const void* values, const uint8_t* packed, int64_t begin, int64_t n, int64_t place, void* out);
  // base, its set entries replaced by elements `place`, `place` + 1, .. of `compressed`.
  void (*restore)(int64_t size, const void* compressed, const uint8_t* packed, const void* base, int64_t begin, int64_t n, int64_t place,
                  void* out);
};

TASKLOOM_LOOPS(MaskedCompressLoops, masked_compress_loops)

}  // namespace taskloom
