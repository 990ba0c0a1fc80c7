// CPU loops of packed_mask, compiled once per CPU level.
#include "masked/packed_mask.h"

namespace taskloom {
namespace {

void pack(const uint8_t* __restrict__ mask, int64_t n, uint8_t* __restrict__ packed) {
  const int64_t whole = n / 8;
  for (int64_t byte = 0; byte < whole; ++byte) {
    uint8_t bits = 0;
    for (int bit = 0; bit < 8; ++bit) bits = static_cast<uint8_t>(bits | (mask[8 * byte + bit] != 0 ? 1u << bit : 0u));
    packed[byte] = bits;
  }
  if (n % 8 == 0) return;
  uint8_t bits = 0;
  for (int64_t i = 8 * whole; i < n; ++i) bits = static_cast<uint8_t>(bits | (mask[i] != 0 ? 1u << (i & 7) : 0u));
  packed[whole] = bits;
}

void unpack(const uint8_t* __restrict__ packed, int64_t n, uint8_t* __restrict__ mask) {
  for (int64_t i = 0; i < n; ++i) mask[i] = static_cast<uint8_t>((packed[i >> 3] >> (i & 7)) & 1);
}

const PackedMaskLoops table = {pack, unpack};

}  // namespace

TASKLOOM_EXPORT_LOOPS(PackedMaskLoops, packed_mask_loops, table)

}  // namespace taskloom
