// Sixteen entries at a time in the widest vectors of a CPU level, with the same bits at every level: only operations that IEEE 754 rounds
// exactly once, no contraction, and an exponential of our own. For NAME_loops.cpp files: everything here has internal linkage. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/exponential_terms.h"

namespace taskloom {
namespace {

#if defined(__AVX512F__)
constexpr int native_bytes = 64;
#elif defined(__AVX2__)
constexpr int native_bytes = 32;
#else
constexpr int native_bytes = 16;
#endif

constexpr int lanes = 16;

template <class T>
struct Lanes {
  typedef T Native __attribute__((vector_size(native_bytes)));
  static constexpr int parts = lanes * static_cast<int>(sizeof(T)) / native_bytes;
  Native part[parts];
};

#define TASKLOOM_LANES \
  template <class T>   \
  inline __attribute__((always_inline)) Lanes<T>

TASKLOOM_LANES load_lanes(const T* from) {
  Lanes<T> r;
  std::memcpy(&r, from, sizeof r);
  return r;
}

template <class T>
inline __attribute__((always_inline)) void store_lanes(T* to, const Lanes<T>& a) {
  std::memcpy(to, &a, sizeof a);
}

TASKLOOM_LANES every_lane(T value) {
  Lanes<T> r;
  for (auto& part : r.part) part = value - typename Lanes<T>::Native{};
  return r;
}

TASKLOOM_LANES operator+(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i) r.part[i] = a.part[i] + b.part[i];
  return r;
}

TASKLOOM_LANES operator-(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i) r.part[i] = a.part[i] - b.part[i];
  return r;
}

TASKLOOM_LANES operator*(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i) r.part[i] = a.part[i] * b.part[i];
  return r;
}

TASKLOOM_LANES operator/(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i) r.part[i] = a.part[i] / b.part[i];
  return r;
}

// a > b ? yes : no, in each lane.
TASKLOOM_LANES where_above(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& yes, const Lanes<T>& no) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i) r.part[i] = a.part[i] > b.part[i] ? yes.part[i] : no.part[i];
  return r;
}

// a == 0 ? yes : no, in each lane.
TASKLOOM_LANES where_zero(const Lanes<T>& a, const Lanes<T>& yes, const Lanes<T>& no) {
  Lanes<T> r;
  const typename Lanes<T>::Native zero{};
  for (int i = 0; i < Lanes<T>::parts; ++i) r.part[i] = a.part[i] == zero ? yes.part[i] : no.part[i];
  return r;
}

TASKLOOM_LANES larger(const Lanes<T>& a, const Lanes<T>& b) { return where_above(a, b, a, b); }

inline __attribute__((always_inline)) Lanes<float> square_root(const Lanes<float>& a) {
  Lanes<float> r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_sqrt_ps(a.part[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < Lanes<float>::parts; ++i) r.part[i] = _mm256_sqrt_ps(a.part[i]);
#elif defined(__SSE2__)
  for (int i = 0; i < Lanes<float>::parts; ++i) r.part[i] = _mm_sqrt_ps(a.part[i]);
#else
  for (int i = 0; i < Lanes<float>::parts; ++i)
    for (int lane = 0; lane < native_bytes / 4; ++lane) r.part[i][lane] = std::sqrt(a.part[i][lane]);
#endif
  return r;
}

inline __attribute__((always_inline)) Lanes<double> square_root(const Lanes<double>& a) {
  Lanes<double> r;
#if defined(__AVX512F__)
  for (int i = 0; i < Lanes<double>::parts; ++i) r.part[i] = _mm512_sqrt_pd(a.part[i]);
#elif defined(__AVX2__)
  for (int i = 0; i < Lanes<double>::parts; ++i) r.part[i] = _mm256_sqrt_pd(a.part[i]);
#elif defined(__SSE2__)
  for (int i = 0; i < Lanes<double>::parts; ++i) r.part[i] = _mm_sqrt_pd(a.part[i]);
#else
  for (int i = 0; i < Lanes<double>::parts; ++i)
    for (int lane = 0; lane < native_bytes / 8; ++lane) r.part[i][lane] = std::sqrt(a.part[i][lane]);
#endif
  return r;
}

TASKLOOM_LANES absolute(const Lanes<T>& a) {
  using Int = typename Words<T>::Int;
  typedef Int Bits __attribute__((vector_size(native_bytes)));
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::parts; ++i) {
    r.part[i] = (typename Lanes<T>::Native)((Bits)a.part[i] & (Words<T>::magnitude - Bits{}));
  }
  return r;
}

template <class T>
inline T bits_infinity() {
  T value;
  std::memcpy(&value, &Words<T>::infinity, sizeof value);
  return value;
}

// The exponential to about one unit in the last place; what would be subnormal is 0.
TASKLOOM_LANES exponential(const Lanes<T>& x) {
  using Table = ExpTable<T>;
  using Int = typename Words<T>::Int;
  using Native = typename Lanes<T>::Native;
  typedef Int Bits __attribute__((vector_size(native_bytes)));
  Lanes<T> r;
  const Native zero{};
  for (int i = 0; i < Lanes<T>::parts; ++i) {
    const Native v = x.part[i];
    // Comparisons that are false for NaN keep it.
    const Native above = v < Table::lowest + zero ? Table::lowest + zero : v;
    const Native kept = above > Table::highest + zero ? Table::highest + zero : above;
    const Native shifted = kept * Table::log2_e + Table::rounder;
    const Native power = shifted - Table::rounder;
    const Native rest = (kept - power * Table::ln2_high) - power * Table::ln2_low;
    Native sum = Table::inverse_factorial[Table::terms - 1] + zero;
    for (int term = Table::terms - 2; term >= 0; --term) sum = sum * rest + Table::inverse_factorial[term];
    // Half of the power of two, doubled after, so that the largest one does not overflow on its own.
    const Bits scale = ((Bits)shifted << Words<T>::mantissa) + Words<T>::one_half;
    const Native scaled = (sum * (Native)scale) * T{2};
    const Native floored = v < Table::lowest + zero ? zero : scaled;
    r.part[i] = v > Table::highest + zero ? (Native)(Words<T>::infinity + Bits{}) : floored;
  }
  return r;
}

// The lanes added up in a fixed order.
template <class T>
inline T sum_of_lanes(const Lanes<T>& a) {
  T one[lanes];
  store_lanes(one, a);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) one[lane] = one[lane] + one[lane + width];
  return one[0];
}

#undef TASKLOOM_LANES

}  // namespace
}  // namespace taskloom
