// CPU loops of masked_compress and masked_restore, compiled once per CPU level.
#include "masked/mask_words.h"
#include "masked/masked_compress.h"

namespace taskloom {
namespace {

constexpr uint64_t all_set = ~uint64_t{0};

int64_t count(const uint8_t* packed, int64_t begin, int64_t n) {
  uint64_t words[mask_block_words];
  int64_t bits = 0;
  for (int64_t done = 0; done < n; done += mask_block) {
    load_words(packed, begin + done, n - done < mask_block ? n - done : mask_block, mask_block_words, words);
    bits += count_bits(words, mask_block_words);
  }
  return bits;
}

template <class Lane>
void compress_lanes(const Lane* values, const uint8_t* packed, int64_t begin, int64_t n, Lane* out) {
  uint64_t words[mask_block_words];
  for (int64_t done = 0; done < n; done += mask_block) {
    load_words(packed, begin + done, n - done < mask_block ? n - done : mask_block, mask_block_words, words);
    for (int64_t w = 0; w < mask_block_words; ++w) {
      const Lane* from = values + begin + done + 64 * w;
      if (words[w] == all_set) {
        std::memcpy(out, from, 64 * sizeof(Lane));
        out += 64;
        continue;
      }
      for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1) *out++ = from[__builtin_ctzll(bits)];
    }
  }
}

template <class Lane>
void restore_lanes(const Lane* compressed, const uint8_t* packed, const Lane* base, int64_t begin, int64_t n, Lane* out) {
  uint64_t words[mask_block_words];
  for (int64_t done = 0; done < n; done += mask_block) {
    const int64_t size = n - done < mask_block ? n - done : mask_block;
    load_words(packed, begin + done, size, mask_block_words, words);
    std::memcpy(out + begin + done, base + begin + done, static_cast<size_t>(size) * sizeof(Lane));
    for (int64_t w = 0; w < mask_block_words; ++w) {
      Lane* to = out + begin + done + 64 * w;
      if (words[w] == all_set) {
        std::memcpy(to, compressed, 64 * sizeof(Lane));
        compressed += 64;
        continue;
      }
      for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1) to[__builtin_ctzll(bits)] = *compressed++;
    }
  }
}

template <class Lane>
void compress_as(const void* values, const uint8_t* packed, int64_t begin, int64_t n, int64_t place, void* out) {
  compress_lanes(static_cast<const Lane*>(values), packed, begin, n, static_cast<Lane*>(out) + place);
}

template <class Lane>
void restore_as(const void* compressed, const uint8_t* packed, const void* base, int64_t begin, int64_t n, int64_t place, void* out) {
  restore_lanes(static_cast<const Lane*>(compressed) + place, packed, static_cast<const Lane*>(base), begin, n, static_cast<Lane*>(out));
}

void compress(int64_t size, const void* values, const uint8_t* packed, int64_t begin, int64_t n, int64_t place, void* out) {
  switch (size) {
    case 1:
      return compress_as<uint8_t>(values, packed, begin, n, place, out);
    case 2:
      return compress_as<uint16_t>(values, packed, begin, n, place, out);
    case 4:
      return compress_as<uint32_t>(values, packed, begin, n, place, out);
    default:
      return compress_as<uint64_t>(values, packed, begin, n, place, out);
  }
}

void restore(int64_t size, const void* compressed, const uint8_t* packed, const void* base, int64_t begin, int64_t n, int64_t place,
             void* out) {
  switch (size) {
    case 1:
      return restore_as<uint8_t>(compressed, packed, base, begin, n, place, out);
    case 2:
      return restore_as<uint16_t>(compressed, packed, base, begin, n, place, out);
    case 4:
      return restore_as<uint32_t>(compressed, packed, base, begin, n, place, out);
    default:
      return restore_as<uint64_t>(compressed, packed, base, begin, n, place, out);
  }
}

const MaskedCompressLoops table = {count, compress, restore};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MaskedCompressLoops, masked_compress_loops, table)

}  // namespace taskloom
