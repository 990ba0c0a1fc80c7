// CPU loops of magnitude_threshold, compiled once per CPU level.
#include <type_traits>

#include "common/convert.h"
#include "common/lanes_avx512.h"
#include "masked/magnitude_threshold.h"

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

#ifdef __AVX512BW__
// One bracket's counts in registers while a run of entries passes.
struct LaneBracket {
  __m512i low, high, above, equal_high, equal_low;
  int32_t* to;

  explicit LaneBracket(const BracketCount& bracket)
      : low(_mm512_set1_epi32(static_cast<int32_t>(bracket.low))),
        high(_mm512_set1_epi32(static_cast<int32_t>(bracket.high))),
        above(_mm512_setzero_si512()),
        equal_high(_mm512_setzero_si512()),
        equal_low(_mm512_setzero_si512()),
        to(static_cast<int32_t*>(bracket.between_bits)) {}

  void count(__m512i bits, __mmask16 inside, __m512i one) {
    const __mmask16 over = _mm512_mask_cmpgt_epi32_mask(inside, bits, high);
    const __mmask16 at_high = _mm512_mask_cmpeq_epi32_mask(inside, bits, high);
    const __mmask16 over_low = _mm512_mask_cmpgt_epi32_mask(inside, bits, low);
    above = _mm512_mask_add_epi32(above, over, above, one);
    equal_high = _mm512_mask_add_epi32(equal_high, at_high, equal_high, one);
    equal_low = _mm512_mask_add_epi32(equal_low, _mm512_mask_cmpeq_epi32_mask(inside, bits, low), equal_low, one);
    // Stored whether there are any or not: a branch would be guessed wrong more often than that costs.
    const auto between = static_cast<__mmask16>(over_low & ~(over | at_high));
    if (to == nullptr) return;
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(between, bits));
    to += __builtin_popcount(between);
  }

  void finish(BracketCount* bracket) const {
    bracket->above = _mm512_reduce_add_epi32(above);
    bracket->equal_high = _mm512_reduce_add_epi32(equal_high);
    bracket->equal_low = _mm512_reduce_add_epi32(equal_low);
    bracket->between = to - static_cast<int32_t*>(bracket->between_bits);
  }
};

template <DType dtype, int count>
void count_brackets_in_lanes(const Delta& delta, int64_t begin, int64_t n, BracketCount* brackets) {
  LaneBracket first(brackets[0]), second(brackets[count - 1]);
  const __m512i one = _mm512_set1_epi32(1);
  for (int64_t i = 0; i < n; i += lane_count) {
    const __mmask16 inside = lanes_inside(n - i);
    __m512 value = Storage<dtype>::load(delta.tuned, begin + i, inside);
    if (delta.base != nullptr) value = _mm512_sub_ps(value, Storage<dtype>::load(delta.base, begin + i, inside));
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(INT32_MAX));
    first.count(bits, inside, one);
    if constexpr (count == 2) second.count(bits, inside, one);
  }
  first.finish(&brackets[0]);
  if constexpr (count == 2) second.finish(&brackets[1]);
}

template <DType dtype>
void count_brackets_in_lanes(const Delta& delta, int64_t begin, int64_t n, BracketCount* brackets, int count) {
  for (; count >= 2; count -= 2, brackets += 2) count_brackets_in_lanes<dtype, 2>(delta, begin, n, brackets);
  if (count == 1) count_brackets_in_lanes<dtype, 1>(delta, begin, n, brackets);
}
#endif

template <bool wide>
void count_brackets_of(const Delta& delta, int64_t begin, int64_t n, BracketCount* brackets, int count) {
  alignas(64) Bits<wide> bits[block];
  for_blocks(begin, n, [&](int64_t at, int64_t length, int64_t) {
    block_magnitudes<wide>(delta, at, length, bits);
    for (int i = 0; i < count; ++i) count_block<wide>(bits, length, brackets[i]);
  });
}

void count_brackets(bool wide, const Delta& delta, int64_t begin, int64_t n, BracketCount* brackets, int count) {
  for (int i = 0; i < count; ++i) brackets[i].above = brackets[i].equal_high = brackets[i].equal_low = brackets[i].between = 0;
#ifdef __AVX512BW__
  if (!wide && (delta.base == nullptr || delta.base_dtype == delta.tuned_dtype)) {
    switch (delta.tuned_dtype) {
      case DType::bf16:
        return count_brackets_in_lanes<DType::bf16>(delta, begin, n, brackets, count);
      case DType::f16:
        return count_brackets_in_lanes<DType::f16>(delta, begin, n, brackets, count);
      default:
        return count_brackets_in_lanes<DType::f32>(delta, begin, n, brackets, count);
    }
  }
#endif
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
