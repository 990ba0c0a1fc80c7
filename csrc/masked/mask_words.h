// Masks as 64-bit words, 512 entries at a time. For NAME_loops.cpp files, so that every CPU level compiles its own copy: everything here
// has internal linkage. Torch-free; little-endian.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/convert.h"
#include "common/unaligned.h"

namespace taskloom {
namespace {

constexpr int64_t mask_block = 512;
constexpr int64_t mask_block_words = mask_block / 64;

// Entries begin .. begin + n of a packed mask (begin a multiple of 8, n at most 64 * count); the bits from n on are zero.
inline void load_words(const uint8_t* packed, int64_t begin, int64_t n, int64_t count, uint64_t* words) {
  for (int64_t w = 0; w < count; ++w) words[w] = 0;
  std::memcpy(words, packed + begin / 8, static_cast<size_t>((n + 7) / 8));
  if (n % 64 != 0) words[n / 64] &= (uint64_t{1} << (n % 64)) - 1;
}

inline void store_words(const uint64_t* words, int64_t begin, int64_t n, uint8_t* packed) {
  std::memcpy(packed + begin / 8, words, static_cast<size_t>((n + 7) / 8));
}

// n bytes of flags (0 is unset) as one block of words; the bits from n on are zero.
inline void pack_words(const uint8_t* flags, int64_t n, uint64_t* words) {
  alignas(64) uint8_t padded[mask_block];
  if (n < mask_block) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, flags, static_cast<size_t>(n));
    flags = padded;
  }
  constexpr uint64_t low = 0x7f7f7f7f7f7f7f7full, high = 0x8080808080808080ull;
  for (int64_t w = 0; w < mask_block_words; ++w) {
    uint64_t word = 0;
    for (int64_t byte = 0; byte < 8; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, flags + 64 * w + 8 * byte, sizeof eight);
      const uint64_t set = ((((eight & low) + low) | eight) & high) >> 7;
      // Multiplying moves the eight flags, one in each byte, next to each other in the highest byte.
      word |= ((set * 0x0102040810204080ull) >> 56) << (8 * byte);
    }
    words[w] = word;
  }
}

inline int64_t count_bits(const uint64_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t w = 0; w < count; ++w) bits += __builtin_popcountll(words[w]);
  return bits;
}

// Where a block sets at most this many entries they are gathered, computed and put back; where it sets more, the block is computed whole.
constexpr int64_t sparse_limit = 8;

// The positions of a block's set bits, 1 to sparse_limit of them; the last one is repeated, so that the loops over them have one length.
inline void set_positions(const uint64_t* words, int32_t* positions) {
  int64_t count = 0;
  for (int64_t w = 0; w < mask_block_words; ++w) {
    for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1) {
      positions[count++] = static_cast<int32_t>(64 * w + __builtin_ctzll(bits));
    }
  }
  const int32_t last = positions[count - 1];
  for (int64_t i = 0; i < sparse_limit; ++i) positions[i] = i < count ? positions[i] : last;
}

template <class Lane>
struct LaneBits {
  static constexpr int digits = 8 * sizeof(Lane);
  Lane bit[digits];
  constexpr LaneBits() : bit() {
    for (int i = 0; i < digits; ++i) bit[i] = static_cast<Lane>(Lane{1} << i);
  }
};

// lanes[i] = all ones where entry i of the block is set, else zero.
template <class Lane>
inline void expand_words(const uint64_t* words, Lane* __restrict__ lanes) {
  constexpr int digits = LaneBits<Lane>::digits;
  alignas(64) constexpr LaneBits<Lane> places;
  for (int64_t w = 0; w < mask_block_words; ++w) {
    for (int part = 0; part < 64 / digits; ++part) {
      const Lane bits = static_cast<Lane>(words[w] >> (digits * part));
      Lane* __restrict__ to = lanes + 64 * w + digits * part;
      for (int i = 0; i < digits; ++i) to[i] = (bits & places.bit[i]) != 0 ? static_cast<Lane>(~Lane{0}) : Lane{0};
    }
  }
}

// A lane as a number and back: Acc's own bits, or bfloat16's (computed in float) where a lane has half the size.
template <class Acc, class Lane>
inline Acc lane_value(Lane lane) {
  if constexpr (sizeof(Acc) == sizeof(Lane)) {
    return __builtin_bit_cast(Acc, lane);
  } else {
    return static_cast<Acc>(bfloat16_to_float(static_cast<uint16_t>(lane)));
  }
}

template <class Acc, class Lane>
inline Lane value_lane(Acc value) {
  if constexpr (sizeof(Acc) == sizeof(Lane)) {
    return __builtin_bit_cast(Lane, value);
  } else {
    return static_cast<Lane>(float_to_bfloat16(static_cast<float>(value)));
  }
}

// Whether lane_value and value_lane are those of a target's dtype, and a delta is in Acc.
template <class Acc, class Lane>
inline bool has_plain_lanes(DType target, DType delta) {
  if (delta != (sizeof(Acc) == sizeof(float) ? DType::f32 : DType::f64)) return false;
  return sizeof(Lane) == sizeof(Acc) || (sizeof(Acc) == sizeof(float) && target == DType::bf16);
}

template <class Lane>
inline void gather_lanes(const void* data, int64_t at, const int32_t* positions, uint8_t* to) {
  for (int64_t i = 0; i < sparse_limit; ++i) store_at(to, i, load_at<Lane>(data, at + positions[i]));
}

// sparse_limit elements of 2, 4 or 8 bytes at `positions`, counted from element `at`, next to each other; their bits are not changed.
inline void gather_elements(int64_t size, const void* data, int64_t at, const int32_t* positions, uint8_t* to) {
  switch (size) {
    case 2:
      return gather_lanes<uint16_t>(data, at, positions, to);
    case 4:
      return gather_lanes<uint32_t>(data, at, positions, to);
    default:
      return gather_lanes<uint64_t>(data, at, positions, to);
  }
}

}  // namespace
}  // namespace taskloom
