// Masks of the entries whose magnitude lies in a band of descending ranks: 0/1 bytes or packed bits. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "masked/magnitude_threshold.h"

namespace taskloom {

// Kept are the entries inside `outer` and not inside `inner`.
struct MagnitudeBand {
  Cut outer, inner;
};

struct MagnitudeMaskLoops {
  // Bytes 0 or 1 for n magnitudes (int32, int64 where wide), the first of which has index `first` in the cuts' counting.
  void (*keep)(bool wide, const void* bits, int64_t n, int64_t first, const MagnitudeBand& band, uint8_t* mask);
};

TASKLOOM_LOOPS(MagnitudeMaskLoops, magnitude_mask_loops)

// `mask` holds numel bytes, or with `packed` (numel + 7) / 8 bytes of bits.
void magnitude_mask(const Delta& delta, int64_t numel, bool wide, const MagnitudeBand& band, bool packed, uint8_t* mask,
                    const ParallelFor& parallel);
// The same for ranks within each row.
void row_magnitude_mask(const Delta& delta, int64_t rows, int64_t row_length, bool wide, int64_t rank_begin, int64_t rank_end, bool packed,
                        uint8_t* mask, const ParallelFor& parallel);

}  // namespace taskloom
