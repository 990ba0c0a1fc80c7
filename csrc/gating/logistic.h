// The logistic function and SiLU for gates: an exponential of our own for arguments cut off where nothing changes any more, with the same
// bits at every CPU level. For NAME_loops.cpp files: internal linkage. Torch-free.
#pragma once

#include "routed/activations.h"

namespace taskloom {
namespace {

// x, or the nearer end where it is outside of low .. high; NaN stays.
inline __attribute__((always_inline)) Lanes<float> cut_off(const Lanes<float>& x, float low, float high) {
  const Lanes<float> lows = every_lane(low), highs = every_lane(high);
  Lanes<float> r;
  for (int i = 0; i < Lanes<float>::parts; ++i) {
#if defined(__AVX512F__)
    r.part[i] = _mm512_min_ps(highs.part[i], _mm512_max_ps(lows.part[i], x.part[i]));
#elif defined(__AVX2__)
    r.part[i] = _mm256_min_ps(highs.part[i], _mm256_max_ps(lows.part[i], x.part[i]));
#elif defined(__SSE2__)
    r.part[i] = _mm_min_ps(highs.part[i], _mm_max_ps(lows.part[i], x.part[i]));
#else
    const auto above = x.part[i] < lows.part[i] ? lows.part[i] : x.part[i];
    r.part[i] = above > highs.part[i] ? highs.part[i] : above;
#endif
  }
  return r;
}

// 1 + exp(-x), where exp(-x) is infinite from 88.4 on and of no account below -87. exp(0) is exactly 1. The polynomial is a Chebyshev fit
// of our own, to 1e-8.
inline __attribute__((always_inline)) Lanes<float> one_and_exponential(const Lanes<float>& x) {
  using Table = ExpTable<float>;
  typedef int32_t Bits __attribute__((vector_size(native_bytes)));
  constexpr float fit[] = {1.0f, 1.0f, 0.5f, 0.166665047f, 0.0416663513f, 0.00836923905f, 0.001394124f};
  const Lanes<float> kept = cut_off(every_lane(0.0f) - x, -87.0f, 89.0f);
  const Lanes<float> shifted = kept * every_lane(Table::log2_e) + every_lane(Table::rounder), power = shifted - every_lane(Table::rounder);
  const Lanes<float> rest = (kept - power * every_lane(Table::ln2_high)) - power * every_lane(Table::ln2_low);
  const Lanes<float> sum = polynomial(rest, fit, 6);
  Lanes<float> scale;
  for (int i = 0; i < Lanes<float>::parts; ++i) {
    scale.part[i] = (Lanes<float>::Native)(((Bits)shifted.part[i] << 23) + 0x3f800000);
  }
  return every_lane(1.0f) + sum * scale;
}

inline __attribute__((always_inline)) Lanes<double> one_and_exponential(const Lanes<double>& x) {
  return every_lane(1.0) + exponential(every_lane(0.0) - x);
}

// 1 / (1 + exp(-x)); exactly a half at 0.
template <class T>
inline __attribute__((always_inline)) Lanes<T> gate_of(const Lanes<T>& x) {
  return every_lane(T{1}) / one_and_exponential(x);
}

template <Activation activation, class T>
inline __attribute__((always_inline)) Lanes<T> gated(const Lanes<T>& x) {
  if constexpr (activation == Activation::silu) {
    return x / one_and_exponential(x);
  } else {
    return activated<activation>(x);
  }
}

template <Activation activation, class T>
inline __attribute__((always_inline)) Lanes<T> gated_slope(const Lanes<T>& x) {
  if constexpr (activation == Activation::silu) {
    const Lanes<T> one = every_lane(T{1}), gate = gate_of(x);
    return gate * (one + x * (one - gate));
  } else {
    return slope_of<activation>(x);
  }
}

}  // namespace
}  // namespace taskloom
