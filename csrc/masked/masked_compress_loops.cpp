// CPU loops of masked_compress and masked_restore, compiled once per CPU level.
#include "masked/mask_words.h"
#include "masked/masked_compress.h"

namespace taskloom {
namespace {

constexpr uint64_t all_set = ~uint64_t{0};

int64_t count(const uint8_t* packed, int64_t begin, int64_t n) {
  const int64_t whole = n / 64, rest = n % 64;
  int64_t bits = 0;
  for (int64_t w = 0; w < whole; ++w) bits += __builtin_popcountll(load_at<uint64_t>(packed + begin / 8, w));
  uint64_t last = 0;
  if (rest != 0) load_words(packed, begin + 64 * whole, rest, 1, &last);
  return bits + __builtin_popcountll(last);
}

template <class Lane>
void compress_as(const void* values, const uint8_t* packed, int64_t begin, int64_t n, int64_t place, void* out) {
  constexpr auto width = static_cast<int64_t>(sizeof(Lane));
  uint64_t words[mask_block_words];
  char* to = static_cast<char*>(out) + width * place;
  for (int64_t done = 0; done < n; done += mask_block) {
    load_words(packed, begin + done, n - done < mask_block ? n - done : mask_block, mask_block_words, words);
    for (int64_t w = 0; w < mask_block_words; ++w) {
      const char* from = static_cast<const char*>(values) + width * (begin + done + 64 * w);
      if (words[w] == all_set) {
        std::memcpy(to, from, 64 * sizeof(Lane));
        to += 64 * width;
        continue;
      }
      for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1, to += width) store_at(to, 0, load_at<Lane>(from, __builtin_ctzll(bits)));
    }
  }
}

template <class Lane>
void restore_as(const void* compressed, const uint8_t* packed, const void* base, int64_t begin, int64_t n, int64_t place, void* out) {
  constexpr auto width = static_cast<int64_t>(sizeof(Lane));
  uint64_t words[mask_block_words];
  const char* from = static_cast<const char*>(compressed) + width * place;
  for (int64_t done = 0; done < n; done += mask_block) {
    const int64_t size = n - done < mask_block ? n - done : mask_block;
    load_words(packed, begin + done, size, mask_block_words, words);
    char* to = static_cast<char*>(out) + width * (begin + done);
    std::memcpy(to, static_cast<const char*>(base) + width * (begin + done), static_cast<size_t>(width * size));
    for (int64_t w = 0; w < mask_block_words; ++w, to += 64 * width) {
      if (words[w] == all_set) {
        std::memcpy(to, from, 64 * sizeof(Lane));
        from += 64 * width;
        continue;
      }
      for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1, from += width)
        store_at(to, __builtin_ctzll(bits), load_at<Lane>(from, 0));
    }
  }
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
