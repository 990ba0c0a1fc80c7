// CPU loops of mask_count, compiled once per CPU level. Counters are bit-sliced: plane p holds bit p of the counts of 64 entries a word.
#include "masked/mask_count.h"
#include "masked/mask_words.h"

namespace taskloom {
namespace {

constexpr int64_t step_words = 64;
constexpr int64_t step = 64 * step_words;
constexpr int plane_limit = 20;

using Words = uint64_t[step_words];

struct Planes {
  alignas(64) Words plane[plane_limit];
  alignas(64) Words members[plane_limit];  // one level of the histogram's tree each
  alignas(64) Words masks[8];
  int count;
};

inline int bits_of(int64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(static_cast<unsigned long long>(value)); }

inline uint64_t full_add(uint64_t a, uint64_t b, uint64_t c, uint64_t* carry) {
  const uint64_t half = a ^ b;
  *carry = (a & b) | (half & c);
  return half ^ c;
}

// Adds carry[] to the planes from `first` on.
inline void ripple(Planes* planes, int first, int last, uint64_t* __restrict__ carry) {
  for (int p = first; p < last; ++p) {
    uint64_t* __restrict__ plane = planes->plane[p];
    for (int64_t w = 0; w < step_words; ++w) {
      const uint64_t next = plane[w] & carry[w];
      plane[w] ^= carry[w];
      carry[w] = next;
    }
  }
}

// Seven full adders take eight masks into the planes of 1, 2 and 4; what they carry is the sum's bit of 8, left in masks[0].
inline void add_eight(Planes* planes) {
  auto& m = planes->masks;
  uint64_t* __restrict__ one_plane = planes->plane[0];
  uint64_t* __restrict__ two_plane = planes->plane[1];
  uint64_t* __restrict__ four_plane = planes->plane[2];
  for (int64_t w = 0; w < step_words; ++w) {
    uint64_t two_a, two_b, four_a, four_b, eight;
    uint64_t ones = full_add(one_plane[w], m[0][w], m[1][w], &two_a);
    ones = full_add(ones, m[2][w], m[3][w], &two_b);
    uint64_t twos = full_add(two_plane[w], two_a, two_b, &four_a);
    ones = full_add(ones, m[4][w], m[5][w], &two_a);
    ones = full_add(ones, m[6][w], m[7][w], &two_b);
    twos = full_add(twos, two_a, two_b, &four_b);
    four_plane[w] = full_add(four_plane[w], four_a, four_b, &eight);
    one_plane[w] = ones;
    two_plane[w] = twos;
    m[0][w] = eight;
  }
}

inline void count_masks(const uint8_t* const* masks, int64_t tasks, int64_t at, int64_t n, Planes* planes) {
  std::memset(planes->plane, 0, static_cast<size_t>(planes->count) * sizeof(Words));
  int64_t t = 0;
  for (; t + 8 <= tasks; t += 8) {
    for (int64_t j = 0; j < 8; ++j) load_words(masks[t + j], at, n, step_words, planes->masks[j]);
    add_eight(planes);
    ripple(planes, 3, bits_of(t + 8), planes->masks[0]);
  }
  for (; t < tasks; ++t) {
    load_words(masks[t], at, n, step_words, planes->masks[0]);
    ripple(planes, 0, bits_of(t + 1), planes->masks[0]);
  }
}

// out = entries whose count is at least k.
inline void at_least(const Planes& planes, int64_t k, uint64_t* __restrict__ out) {
  if (k >= int64_t{1} << planes.count) {
    for (int64_t w = 0; w < step_words; ++w) out[w] = 0;
    return;
  }
  for (int64_t w = 0; w < step_words; ++w) {
    uint64_t greater = 0, equal = ~uint64_t{0};
    for (int p = planes.count - 1; p >= 0; --p) {
      const uint64_t bit = planes.plane[p][w];
      const uint64_t wanted = (k >> p) & 1 ? ~uint64_t{0} : 0;
      greater |= equal & bit & ~wanted;
      equal &= ~(bit ^ wanted);
    }
    out[w] = greater | equal;
  }
}

// Splits `members`, whose counts agree above plane p, by the planes below.
void add_to_histogram(Planes* planes, int p, const uint64_t* members, int64_t size, int64_t count, int64_t* histogram) {
  if (size == 0) return;
  if (p < 0) {
    histogram[count] += size;
    return;
  }
  const uint64_t* __restrict__ plane = planes->plane[p];
  uint64_t* __restrict__ part = planes->members[p];
  for (int64_t w = 0; w < step_words; ++w) part[w] = members[w] & plane[w];
  const int64_t with = count_bits(part, step_words);
  add_to_histogram(planes, p - 1, part, with, count | int64_t{1} << p, histogram);
  if (p == 0 || with == size) return add_to_histogram(planes, -1, members, size - with, count, histogram);
  for (int64_t w = 0; w < step_words; ++w) part[w] = members[w] & ~plane[w];
  add_to_histogram(planes, p - 1, part, size - with, count, histogram);
}

void count(const uint8_t* const* masks, int64_t tasks, int64_t k, int64_t begin, int64_t n, uint8_t* packed, int64_t* histogram) {
  Planes planes;
  planes.count = bits_of(tasks);
  alignas(64) Words entries, result;
  for (int64_t done = 0; done < n; done += step) {
    const int64_t size = n - done < step ? n - done : step;
    for (int64_t w = 0; w < step_words; ++w) {
      const int64_t left = size - 64 * w;
      entries[w] = left >= 64 ? ~uint64_t{0} : left <= 0 ? 0 : (uint64_t{1} << left) - 1;
    }
    count_masks(masks, tasks, begin + done, size, &planes);
    at_least(planes, k, result);
    for (int64_t w = 0; w < step_words; ++w) result[w] &= entries[w];
    store_words(result, begin + done, size, packed);
    add_to_histogram(&planes, planes.count - 1, entries, size, 0, histogram);
  }
}

const MaskCountLoops table = {count};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MaskCountLoops, mask_count_loops, table)

}  // namespace taskloom
