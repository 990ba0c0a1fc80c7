// CPU loops of packed_mask, compiled once per CPU level.
#include <cstring>

#include "masked/packed_mask.h"

namespace taskloom {
namespace {

constexpr uint64_t every_byte = 0x0101010101010101u;
constexpr uint64_t low_seven_bits = 0x7f * every_byte;

// 1 in each byte of `bytes` that is not zero.
inline uint64_t nonzero_bytes(uint64_t bytes) { return ((((bytes & low_seven_bits) + low_seven_bits) | bytes) >> 7) & every_byte; }

void pack(const uint8_t* __restrict__ mask, int64_t n, uint8_t* __restrict__ packed) {
  const int64_t whole = n / 8;
  for (int64_t byte = 0; byte < whole; ++byte) {
    uint64_t entries;
    std::memcpy(&entries, mask + 8 * byte, sizeof entries);
    // Byte i moves to bit 56 + i, and no two of the product's parts share a bit.
    packed[byte] = static_cast<uint8_t>((nonzero_bytes(entries) * 0x0102040810204080u) >> 56);
  }
  if (n % 8 == 0) return;
  uint8_t bits = 0;
  for (int64_t i = 8 * whole; i < n; ++i) bits = static_cast<uint8_t>(bits | (mask[i] != 0 ? 1u << (i & 7) : 0u));
  packed[whole] = bits;
}

void unpack(const uint8_t* __restrict__ packed, int64_t n, uint8_t* __restrict__ mask) {
  const int64_t whole = n / 8;
  for (int64_t byte = 0; byte < whole; ++byte) {
    const uint64_t entries = nonzero_bytes((packed[byte] * every_byte) & 0x8040201008040201u);
    std::memcpy(mask + 8 * byte, &entries, sizeof entries);
  }
  for (int64_t i = 8 * whole; i < n; ++i) mask[i] = static_cast<uint8_t>((packed[i >> 3] >> (i & 7)) & 1);
}

const PackedMaskLoops table = {pack, unpack};

}  // namespace

TASKLOOM_EXPORT_LOOPS(PackedMaskLoops, packed_mask_loops, table)

}  // namespace taskloom
