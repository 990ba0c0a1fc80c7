// CPU loops of kernel_merge: statistics of rows, histograms of magnitudes, the merge; compiled once per CPU level.
#include <algorithm>

#include "lowrank/kernel_gradient.h"
#include "lowrank/kernel_merge.h"
#include "lowrank/kernel_strip.h"

namespace taskloom {
namespace {

constexpr int64_t stats_block = 32;

template <class T>
void pack_strips(const T* a, int64_t chunks, int64_t n, int64_t width, T* strips) {
  const int64_t count = (n + strip_rows - 1) / strip_rows;
  for (int64_t strip = 0; strip < count; ++strip)
    for (int64_t p = 0; p < chunks; ++p)
      for (int64_t row = 0; row < strip_rows; ++row) {
        const int64_t i = std::min(strip * strip_rows + row, n - 1);
        for (int64_t k = 0; k < width; ++k) {
          strips[((strip * chunks + p) * width + k) * strip_rows + row] = a[(p * n + i) * width + k];
        }
      }
}

template <class T>
void unpack_strips(const T* strips, int64_t chunks, int64_t n, int64_t width, T* a) {
  for (int64_t p = 0; p < chunks; ++p)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < width; ++k) {
        a[(p * n + i) * width + k] = strips[((i / strip_rows * chunks + p) * width + k) * strip_rows + i % strip_rows];
      }
}

template <class T>
void find_row_stats(const KernelFactors& factors, int64_t strip, T* row_max, T* row_sum) {
  KernelFactors before = factors;
  before.row_max = before.row_sum = nullptr;
  const StripRows<T> rows(before, strip);
  const Lanes<T> scale = every_lane(rows.inverse_gamma);
  Strip<T> largest = every_row(bits_infinity<T>()), sum = every_row(T{0});
  for (auto& lane : largest.lane) lane = every_lane(T{0}) - lane;
  alignas(64) T block[stats_block * strip_rows];
  for (int64_t begin = 0; begin < factors.m; begin += stats_block) {
    const int64_t end = std::min(begin + stats_block, factors.m);
    const Strip<T> before_block = largest;
    for (int64_t j = begin; j < end; ++j) {
      Strip<T> v = rows.mixed(j, nullptr);
      rows.keep(j, v);
      for (int q = 0; q < strip_parts; ++q) {
        v.lane[q] = v.lane[q] * scale;
        largest.lane[q] = larger(v.lane[q], largest.lane[q]);
      }
      store_strip(block + (j - begin) * strip_rows, v);
    }
    for (int q = 0; q < strip_parts; ++q) {
      Lanes<T> part = every_lane(T{0});
      for (int64_t j = 0; j < end - begin; ++j) {
        part = part + exponential(load_lanes(block + j * strip_rows + q * lanes) - largest.lane[q]);
      }
      sum.lane[q] = sum.lane[q] * exponential(before_block.lane[q] - largest.lane[q]) + part;
    }
  }
  store_strip(row_max, largest);
  store_strip(row_sum, sum);
}

template <class T>
inline __attribute__((always_inline)) void store_magnitudes(const Strip<T>& entries, typename Words<T>::Int* bits) {
  for (int q = 0; q < strip_parts; ++q) {
    const Lanes<T> size = absolute(entries.lane[q]);
    std::memcpy(bits + q * lanes, &size, sizeof size);
  }
}

template <class T>
int64_t sample_magnitudes(const KernelFactors& factors, int64_t strip, int64_t j, int64_t first, typename Words<T>::Int* out) {
  const StripRows<T> rows(factors, strip);
  alignas(64) typename Words<T>::Int bits[strip_rows];
  store_magnitudes(rows.entries(j), bits);
  int64_t count = 0;
  for (int64_t i = first; i < rows.valid; i += sample_stride) out[count++] = bits[i];
  return count;
}

// Counts n magnitudes, n at most strip_rows, and appends those inside where there is room for all.
template <class Int>
inline void count_strip(const Int* bits, int64_t n, Int low, Int high, MagnitudeBracket* bracket) {
  Int below = 0, inside = 0, largest = static_cast<Int>(bracket->largest);
  for (int64_t i = 0; i < n; ++i) {
    below += bits[i] < low ? 1 : 0;
    inside += (bits[i] >= low) & (bits[i] <= high) ? 1 : 0;
    largest = bits[i] > largest ? bits[i] : largest;
  }
  if (inside > 0 && bracket->is_complete()) {
    Int* to = static_cast<Int*>(bracket->found) + bracket->inside;
    // Written whether it counts or not: a branch would be guessed wrong more often than that costs.
    for (int64_t i = 0; i < n; ++i) {
      *to = bits[i];
      to += (bits[i] >= low) & (bits[i] <= high) ? 1 : 0;
    }
  }
  bracket->below += below;
  bracket->inside += inside;
  bracket->largest = static_cast<uint64_t>(largest);
}

#ifdef __AVX512F__
inline void count_whole_strip(const int32_t* bits, int32_t low, int32_t high, MagnitudeBracket* bracket) {
  const __m512i least = _mm512_set1_epi32(low), most = _mm512_set1_epi32(high);
  __m512i largest = _mm512_set1_epi32(static_cast<int32_t>(bracket->largest));
  const bool stored = bracket->is_complete();
  int32_t* to = static_cast<int32_t*>(bracket->found) + bracket->inside;
  for (int q = 0; q < strip_parts; ++q) {
    const __m512i one = _mm512_loadu_si512(bits + q * lanes);
    const __mmask16 below = _mm512_cmplt_epi32_mask(one, least);
    const auto inside = static_cast<__mmask16>(_mm512_cmple_epi32_mask(one, most) & ~below);
    if (stored) _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(inside, one));
    const int count = __builtin_popcount(inside);
    to += count;
    bracket->inside += count;
    bracket->below += __builtin_popcount(below);
    largest = _mm512_max_epi32(largest, one);
  }
  bracket->largest = static_cast<uint64_t>(_mm512_reduce_max_epi32(largest));
}
#endif

template <class Int>
inline void count_whole_strip(const Int* bits, Int low, Int high, MagnitudeBracket* bracket) {
  count_strip(bits, strip_rows, low, high, bracket);
}

template <class T>
void bracket_magnitudes(const KernelFactors& factors, int64_t strip, int64_t j_begin, int64_t j_end, MagnitudeBracket* bracket) {
  using Int = typename Words<T>::Int;
  const StripRows<T> rows(factors, strip);
  const auto low = static_cast<Int>(bracket->low), high = static_cast<Int>(bracket->high);
  alignas(64) Int bits[strip_rows];
  // A copy that the compiler knows to be apart from the entries.
  MagnitudeBracket seen = *bracket;
  for (int64_t j = j_begin; j < j_end; ++j) {
    const Strip<T> entries = rows.entries(j);
    rows.keep(j, entries);
    store_magnitudes(entries, bits);
    if (rows.valid == strip_rows) {
      count_whole_strip(bits, low, high, &seen);
    } else {
      count_strip(bits, rows.valid, low, high, &seen);
    }
  }
  *bracket = seen;
}

template <class T>
uint64_t count_magnitudes(const KernelFactors& factors, int64_t strip, int shift, uint64_t prefix, int64_t* counts) {
  using Int = typename Words<T>::Int;
  const StripRows<T> rows(factors, strip);
  const int64_t valid = rows.valid;
  const int prefix_shift = shift + static_cast<int>(histogram_bits);
  const bool first = prefix_shift == static_cast<int>(8 * sizeof(T));
  const auto wanted = static_cast<Int>(prefix);
  constexpr Int digit = (Int{1} << histogram_bits) - 1;
  Int next = Words<T>::magnitude;
  alignas(64) Int bits[strip_rows];
  for (int64_t j = 0; j < factors.m; ++j) {
    store_magnitudes(rows.entries(j), bits);
    if (first) {
      for (int64_t i = 0; i < valid; ++i) ++counts[bits[i] >> shift];
      continue;
    }
    for (int64_t i = valid; i < strip_rows; ++i) bits[i] = bits[valid - 1];
    Int found = 0;
    for (int64_t i = 0; i < strip_rows; ++i) {
      const Int upper = bits[i] >> prefix_shift;
      found |= upper == wanted ? 1 : 0;
      const Int above = upper > wanted ? bits[i] : Words<T>::magnitude;
      next = above < next ? above : next;
    }
    if (found == 0) continue;
    for (int64_t i = 0; i < valid; ++i) {
      if (bits[i] >> prefix_shift == wanted) ++counts[(bits[i] >> shift) & digit];
    }
  }
  return static_cast<uint64_t>(next);
}

template <class T>
void merge_strip(const KernelFactors& factors, int64_t strip, int64_t j_begin, int64_t j_end, Elements base, DType dtype, void* out) {
  const StripRows<T> rows(factors, strip);
  for (int64_t j = j_begin; j < j_end; ++j) {
    const int64_t at = j * factors.n + rows.first;
    Strip<T> merged = rows.gated(rows.entries(j));
    if (base.data != nullptr) {
      const Strip<T> origin = load_elements<T>(base.dtype, base.data, at, rows.valid);
      for (int q = 0; q < strip_parts; ++q) merged.lane[q] = origin.lane[q] + merged.lane[q];
    }
    store_elements(merged, dtype, out, at, rows.valid);
  }
}

void pack(bool wide, const void* a, int64_t chunks, int64_t n, int64_t width, void* strips) {
  if (wide) return pack_strips(static_cast<const double*>(a), chunks, n, width, static_cast<double*>(strips));
  pack_strips(static_cast<const float*>(a), chunks, n, width, static_cast<float*>(strips));
}

void unpack(bool wide, const void* strips, int64_t chunks, int64_t n, int64_t width, void* a) {
  if (wide) return unpack_strips(static_cast<const double*>(strips), chunks, n, width, static_cast<double*>(a));
  unpack_strips(static_cast<const float*>(strips), chunks, n, width, static_cast<float*>(a));
}

void row_stats(const KernelFactors& factors, int64_t strip, void* row_max, void* row_sum) {
  const int64_t at = strip * strip_rows;
  if (factors.wide) return find_row_stats(factors, strip, static_cast<double*>(row_max) + at, static_cast<double*>(row_sum) + at);
  find_row_stats(factors, strip, static_cast<float*>(row_max) + at, static_cast<float*>(row_sum) + at);
}

uint64_t histogram(const KernelFactors& factors, int64_t strip, int shift, uint64_t prefix, int64_t* counts) {
  return factors.wide ? count_magnitudes<double>(factors, strip, shift, prefix, counts)
                      : count_magnitudes<float>(factors, strip, shift, prefix, counts);
}

int64_t sample(const KernelFactors& factors, int64_t strip, int64_t j, int64_t first, void* bits) {
  return factors.wide ? sample_magnitudes<double>(factors, strip, j, first, static_cast<int64_t*>(bits))
                      : sample_magnitudes<float>(factors, strip, j, first, static_cast<int32_t*>(bits));
}

void bracket(const KernelFactors& factors, int64_t strip, int64_t j_begin, int64_t j_end, MagnitudeBracket* seen) {
  if (factors.wide) return bracket_magnitudes<double>(factors, strip, j_begin, j_end, seen);
  bracket_magnitudes<float>(factors, strip, j_begin, j_end, seen);
}

void merge(const KernelFactors& factors, int64_t strip, int64_t j_begin, int64_t j_end, Elements base, DType dtype, void* out) {
  if (factors.wide) return merge_strip<double>(factors, strip, j_begin, j_end, base, dtype, out);
  merge_strip<float>(factors, strip, j_begin, j_end, base, dtype, out);
}

double row_dots(const KernelFactors& factors, const KernelGradients& gradients, int64_t strip, void* row_dot) {
  const int64_t at = strip * strip_rows;
  return factors.wide ? strip_dots(factors, gradients, strip, static_cast<double*>(row_dot) + at)
                      : strip_dots(factors, gradients, strip, static_cast<float*>(row_dot) + at);
}

void backward(const KernelFactors& factors, const KernelGradients& gradients, int64_t strip_begin, int64_t strip_end, int64_t j_begin,
              int64_t j_end, double* sums, void* scratch) {
  if (factors.wide) {
    return tile_backward<double>(factors, gradients, strip_begin, strip_end, j_begin, j_end, sums, static_cast<double*>(scratch));
  }
  tile_backward<float>(factors, gradients, strip_begin, strip_end, j_begin, j_end, sums, static_cast<float*>(scratch));
}

const KernelMergeLoops table = {pack, unpack, row_stats, histogram, sample, bracket, merge, row_dots, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(KernelMergeLoops, kernel_merge_loops, table)

}  // namespace taskloom
