// CPU loops of magnitude_threshold, compiled once per CPU level.
#include <type_traits>

#include "common/convert.h"
#include "masked/magnitude_threshold.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace taskloom {
namespace {

constexpr int64_t block = 512;

template <bool wide>
using Bits = std::conditional_t<wide, int64_t, int32_t>;
template <bool wide>
using Value = std::conditional_t<wide, double, float>;

template <bool wide>
inline void block_magnitudes(const Delta& delta, int64_t begin, int64_t n, Bits<wide>* __restrict__ bits) {
  alignas(64) Value<wide> tuned[block];
  alignas(64) Value<wide> base[block];
  load_block(delta.tuned_dtype, delta.tuned, begin, n, tuned);
  if (delta.base != nullptr) {
    load_block(delta.base_dtype, delta.base, begin, n, base);
    for (int64_t i = 0; i < n; ++i) tuned[i] -= base[i];
  }
  constexpr Bits<wide> absolute = wide ? static_cast<Bits<wide>>(INT64_MAX) : static_cast<Bits<wide>>(INT32_MAX);
  for (int64_t i = 0; i < n; ++i) {
    Bits<wide> raw;
    std::memcpy(&raw, &tuned[i], sizeof raw);
    bits[i] = raw & absolute;
  }
}

template <class Function>
inline void for_blocks(int64_t begin, int64_t n, const Function& function) {
  for (int64_t done = 0; done < n; done += block) function(begin + done, n - done < block ? n - done : block, done);
}

template <bool wide>
void magnitudes_of(const Delta& delta, int64_t begin, int64_t n, Bits<wide>* bits) {
  for_blocks(begin, n, [&](int64_t at, int64_t length, int64_t done) { block_magnitudes<wide>(delta, at, length, bits + done); });
}

void magnitudes(bool wide, const Delta& delta, int64_t begin, int64_t n, void* bits) {
  if (wide) {
    magnitudes_of<true>(delta, begin, n, static_cast<int64_t*>(bits));
  } else {
    magnitudes_of<false>(delta, begin, n, static_cast<int32_t*>(bits));
  }
}

template <bool wide>
inline void count_block(const Bits<wide>* bits, int64_t n, BracketCount& bracket) {
  const Bits<wide> low = static_cast<Bits<wide>>(bracket.low);
  const Bits<wide> high = static_cast<Bits<wide>>(bracket.high);
  Bits<wide> above = 0, equal_high = 0, equal_low = 0, between = 0;
  for (int64_t i = 0; i < n; ++i) {
    above += bits[i] > high;
    equal_high += bits[i] == high;
    equal_low += bits[i] == low;
    between += (bits[i] > low) & (bits[i] < high);
  }
  bracket.above += above;
  bracket.equal_high += equal_high;
  bracket.equal_low += equal_low;
  if (between == 0) return;
  Bits<wide>* to = static_cast<Bits<wide>*>(bracket.between_bits) + bracket.between;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    to[kept] = bits[i];
    kept += (bits[i] > low) & (bits[i] < high);
  }
  bracket.between += kept;
}

#ifdef __AVX512F__
template <>
inline void count_block<false>(const int32_t* bits, int64_t n, BracketCount& bracket) {
  const __m512i low = _mm512_set1_epi32(static_cast<int32_t>(bracket.low));
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(bracket.high));
  int32_t* to = static_cast<int32_t*>(bracket.between_bits) + bracket.between;
  const int32_t* const start = to;
  uint32_t above = 0, equal_high = 0, equal_low = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 inside = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512i value = _mm512_maskz_loadu_epi32(inside, bits + i);
    above += static_cast<uint32_t>(__builtin_popcount(_mm512_mask_cmpgt_epi32_mask(inside, value, high)));
    equal_high += static_cast<uint32_t>(__builtin_popcount(_mm512_mask_cmpeq_epi32_mask(inside, value, high)));
    equal_low += static_cast<uint32_t>(__builtin_popcount(_mm512_mask_cmpeq_epi32_mask(inside, value, low)));
    const __mmask16 between = _mm512_mask_cmplt_epi32_mask(_mm512_mask_cmpgt_epi32_mask(inside, value, low), value, high);
    if (between != 0) {
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(between, value));
      to += __builtin_popcount(between);
    }
  }
  bracket.above += above;
  bracket.equal_high += equal_high;
  bracket.equal_low += equal_low;
  bracket.between += to - start;
}
#endif

template <bool wide>
void count_brackets_of(const Delta& delta, int64_t begin, int64_t n, BracketCount* brackets, int count) {
  alignas(64) Bits<wide> bits[block];
  for (int i = 0; i < count; ++i) brackets[i].above = brackets[i].equal_high = brackets[i].equal_low = brackets[i].between = 0;
  for_blocks(begin, n, [&](int64_t at, int64_t length, int64_t) {
    block_magnitudes<wide>(delta, at, length, bits);
    for (int i = 0; i < count; ++i) count_block<wide>(bits, length, brackets[i]);
  });
}

void count_brackets(bool wide, const Delta& delta, int64_t begin, int64_t n, BracketCount* brackets, int count) {
  if (wide) {
    count_brackets_of<true>(delta, begin, n, brackets, count);
  } else {
    count_brackets_of<false>(delta, begin, n, brackets, count);
  }
}

template <bool wide>
void histogram_of(const Delta& delta, int64_t begin, int64_t n, int shift, int64_t prefix, int64_t* counts) {
  alignas(64) Bits<wide> bits[block];
  constexpr int width = wide ? 64 : 32;
  for_blocks(begin, n, [&](int64_t at, int64_t length, int64_t) {
    block_magnitudes<wide>(delta, at, length, bits);
    if (shift + 16 >= width) {
      for (int64_t i = 0; i < length; ++i) ++counts[bits[i] >> shift];
    } else {
      for (int64_t i = 0; i < length; ++i) {
        if ((bits[i] >> (shift + 16)) == prefix) ++counts[(bits[i] >> shift) & 0xffff];
      }
    }
  });
}

void histogram(bool wide, const Delta& delta, int64_t begin, int64_t n, int shift, int64_t prefix, int64_t* counts) {
  if (wide) {
    histogram_of<true>(delta, begin, n, shift, prefix, counts);
  } else {
    histogram_of<false>(delta, begin, n, shift, prefix, counts);
  }
}

// Most significant digit first, keeping only the entries that share the threshold's digits so far.
template <bool wide>
Cut row_cut_of(const Bits<wide>* bits, int64_t n, int64_t rank, Bits<wide>* scratch) {
  if (rank <= 0) return cut_none(wide);
  if (rank >= n) return cut_all();
  const Bits<wide>* from = bits;
  int64_t left = n;
  int64_t wanted = rank;
  Bits<wide> found = 0;
  for (int top = wide ? 63 : 31; top > 0;) {
    const int shift = top > 8 ? top - 8 : 0;
    const int mask = (1 << (top - shift)) - 1;
    int32_t counts[256] = {};
    for (int64_t i = 0; i < left; ++i) ++counts[(from[i] >> shift) & mask];
    int digit = mask;
    while (wanted > counts[digit]) wanted -= counts[digit--];
    found |= static_cast<Bits<wide>>(digit) << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < left; ++i) {
      const Bits<wide> value = from[i];
      scratch[kept] = value;
      kept += ((value >> shift) & mask) == digit;
    }
    from = scratch;
    left = kept;
    top = shift;
    if (wanted == left && left == 1) {
      return {scratch[0], INT64_MAX};
    }
  }
  if (wanted == left) return {found, INT64_MAX};
  for (int64_t i = 0;; ++i) {
    if (bits[i] == found && --wanted == 0) return {found, i + 1};
  }
}

Cut row_cut(bool wide, const void* bits, int64_t n, int64_t rank, void* scratch) {
  return wide ? row_cut_of<true>(static_cast<const int64_t*>(bits), n, rank, static_cast<int64_t*>(scratch))
              : row_cut_of<false>(static_cast<const int32_t*>(bits), n, rank, static_cast<int32_t*>(scratch));
}

template <bool wide>
struct Ranked {
  Bits<wide> bits;
  int32_t index;
};

// Least significant digit first; entries go in by descending index, so the stable sort leaves the lower of equal ones last.
template <bool wide>
void row_ranks_of(const Bits<wide>* bits, int64_t n, int32_t* ranks, void* scratch) {
  auto* from = static_cast<Ranked<wide>*>(scratch);
  auto* to = from + n;
  for (int64_t i = 0; i < n; ++i) from[i] = {bits[n - 1 - i], static_cast<int32_t>(n - 1 - i)};
  for (int shift = 0; shift < (wide ? 63 : 31); shift += 8) {
    int64_t starts[256] = {};
    for (int64_t i = 0; i < n; ++i) ++starts[(from[i].bits >> shift) & 255];
    if (starts[(from[0].bits >> shift) & 255] == n) continue;
    int64_t sum = 0;
    for (int digit = 0; digit < 256; ++digit) {
      const int64_t count = starts[digit];
      starts[digit] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; ++i) to[starts[(from[i].bits >> shift) & 255]++] = from[i];
    Ranked<wide>* const swap = from;
    from = to;
    to = swap;
  }
  for (int64_t i = 0; i < n; ++i) ranks[from[i].index] = static_cast<int32_t>(i);
}

void row_ranks(bool wide, const void* bits, int64_t n, int32_t* ranks, void* scratch) {
  if (n == 0) return;
  if (wide) {
    row_ranks_of<true>(static_cast<const int64_t*>(bits), n, ranks, scratch);
  } else {
    row_ranks_of<false>(static_cast<const int32_t*>(bits), n, ranks, scratch);
  }
}

const ThresholdLoops table = {magnitudes, count_brackets, histogram, row_cut, row_ranks};

}  // namespace

TASKLOOM_EXPORT_LOOPS(ThresholdLoops, threshold_loops, table)

}  // namespace taskloom
