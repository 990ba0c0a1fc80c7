// CPU loops of magnitude_mask, compiled once per CPU level.
#include "masked/magnitude_mask.h"

namespace taskloom {
namespace {

template <class Bits>
void keep_of(const Bits* __restrict__ bits, int64_t n, int64_t first, const MagnitudeBand& band, uint8_t* __restrict__ mask) {
  auto clamp = [&](int64_t end) { return end <= first ? 0 : end - first < n ? end - first : n; };
  const int64_t outer_ties = clamp(band.outer.tie_end), inner_ties = clamp(band.inner.tie_end);
  const Bits outer = static_cast<Bits>(band.outer.bits), inner = static_cast<Bits>(band.inner.bits);
  for (int64_t i = 0; i < n; ++i) {
    const bool inside = (bits[i] > outer) | ((bits[i] == outer) & (i < outer_ties));
    const bool removed = (bits[i] > inner) | ((bits[i] == inner) & (i < inner_ties));
    mask[i] = static_cast<uint8_t>(inside & !removed);
  }
}

void keep(bool wide, const void* bits, int64_t n, int64_t first, const MagnitudeBand& band, uint8_t* mask) {
  if (wide) {
    keep_of(static_cast<const int64_t*>(bits), n, first, band, mask);
  } else {
    keep_of(static_cast<const int32_t*>(bits), n, first, band, mask);
  }
}

const MagnitudeMaskLoops table = {keep};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MagnitudeMaskLoops, magnitude_mask_loops, table)

}  // namespace taskloom
