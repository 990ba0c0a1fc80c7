// The generator of entries: the values of a strip's rows i against one row j, for NAME_loops.cpp files. Every pass takes its entries from
// here, so that what one pass counts the next one gates. Torch-free, internal linkage.
#pragma once

#include "common/convert.h"
#include "lowrank/kernel_merge.h"
#include "lowrank/lanes.h"

namespace taskloom {
namespace {

constexpr int strip_parts = static_cast<int>(strip_rows) / lanes;

template <class T>
struct Strip {
  Lanes<T> lane[strip_parts];
};

template <class T>
inline __attribute__((always_inline)) Strip<T> every_row(T value) {
  Strip<T> r;
  for (auto& lane : r.lane) lane = every_lane(value);
  return r;
}

template <class T>
inline __attribute__((always_inline)) Strip<T> load_strip(const T* from) {
  Strip<T> r;
  for (int q = 0; q < strip_parts; ++q) r.lane[q] = load_lanes(from + q * lanes);
  return r;
}

template <class T>
inline __attribute__((always_inline)) void store_strip(T* to, const Strip<T>& strip) {
  for (int q = 0; q < strip_parts; ++q) store_lanes(to + q * lanes, strip.lane[q]);
}

template <class T>
constexpr DType dtype_of_arithmetic = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Entries offset .. offset + valid of storage elements; 0 in the rows after them.
template <class T>
inline __attribute__((always_inline)) Strip<T> load_elements(DType dtype, const void* data, int64_t offset, int64_t valid) {
  Strip<T> r;
  if (dtype == dtype_of_arithmetic<T> && valid == strip_rows) {
    std::memcpy(&r, static_cast<const char*>(data) + offset * static_cast<int64_t>(sizeof(T)), sizeof r);
    return r;
  }
  alignas(64) T values[strip_rows] = {};
  load_block(dtype, data, offset, valid, values);
  return load_strip(values);
}

template <class T>
inline __attribute__((always_inline)) void store_elements(const Strip<T>& strip, DType dtype, void* data, int64_t offset, int64_t valid) {
  if (dtype == dtype_of_arithmetic<T> && valid == strip_rows) {
    std::memcpy(static_cast<char*>(data) + offset * static_cast<int64_t>(sizeof(T)), &strip, sizeof strip);
    return;
  }
  alignas(64) T values[strip_rows];
  store_strip(values, strip);
  store_block(dtype, values, valid, data, offset);
}

template <class T>
inline __attribute__((always_inline)) void add_squares(const T* a, const T* b, int64_t width, Strip<T>& sum) {
  for (int64_t k = 0; k < width; ++k) {
    const Lanes<T> other = every_lane(b[k]);
    for (int q = 0; q < strip_parts; ++q) {
      const Lanes<T> apart = load_lanes(a + k * strip_rows + q * lanes) - other;
      sum.lane[q] = sum.lane[q] + apart * apart;
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void add_products(const T* a, const T* b, int64_t width, Strip<T>& sum) {
  for (int64_t k = 0; k < width; ++k) {
    const Lanes<T> other = every_lane(b[k]);
    for (int q = 0; q < strip_parts; ++q) sum.lane[q] = sum.lane[q] + load_lanes(a + k * strip_rows + q * lanes) * other;
  }
}

// One strip against any j.
template <class T>
struct StripRows {
  const KernelFactors& factors;
  const T* a;
  const T* b;
  const T* coef;
  const int64_t first, valid;
  T alpha, beta, inverse_gamma, threshold;
  Strip<T> row_max, row_scale;

  StripRows(const KernelFactors& f, int64_t strip)
      : factors(f),
        a(static_cast<const T*>(f.a) + strip * f.chunks * f.width * strip_rows),
        b(static_cast<const T*>(f.b)),
        coef(static_cast<const T*>(f.coef)),
        first(strip * strip_rows),
        valid(f.n - first < strip_rows ? f.n - first : strip_rows),
        alpha(static_cast<T>(f.alpha)),
        beta(static_cast<T>(f.beta)),
        inverse_gamma(T{1} / static_cast<T>(f.gamma)),
        threshold(static_cast<T>(f.threshold)) {
    if (f.kernel != MergeKernel::mixk || f.row_sum == nullptr) return;
    row_max = load_strip(static_cast<const T*>(f.row_max) + strip * strip_rows);
    row_scale = load_strip(static_cast<const T*>(f.row_sum) + strip * strip_rows);
    for (auto& lane : row_scale.lane) lane = every_lane(T{1}) / lane;
  }

  const T* b_row(int64_t chunk, int64_t j) const { return b + (chunk * factors.m + j) * factors.width; }
  const T* a_chunk(int64_t chunk) const { return a + chunk * factors.width * strip_rows; }

  // What of a kernel is particular to a chunk: distances, or products; kept in `parts` [chunks, strip_rows] where not null.
  // Returns their weighted sum; for sigmoid and rbf, whose chunks are one vector, their plain sum.
  Strip<T> mixed(int64_t j, T* parts) const {
    const MergeKernel kernel = factors.kernel;
    Strip<T> total = every_row(T{0});
    if (kernel == MergeKernel::rbf) {
      for (int64_t p = 0; p < factors.chunks; ++p) add_squares(a_chunk(p), b_row(p, j), factors.width, total);
      return total;
    }
    if (kernel == MergeKernel::sigmoid) {
      for (int64_t p = 0; p < factors.chunks; ++p) add_products(a_chunk(p), b_row(p, j), factors.width, total);
      return total;
    }
    for (int64_t p = 0; p < factors.chunks; ++p) {
      Strip<T> one = every_row(T{0});
      if (kernel == MergeKernel::linear) {
        add_products(a_chunk(p), b_row(p, j), factors.width, one);
      } else {
        add_squares(a_chunk(p), b_row(p, j), factors.width, one);
        for (auto& lane : one.lane) lane = square_root(lane);
      }
      if (parts != nullptr) store_strip(parts + p * strip_rows, one);
      const Lanes<T> scale = every_lane(coef[p]);
      for (int q = 0; q < strip_parts; ++q) total.lane[q] = total.lane[q] + scale * one.lane[q];
    }
    return total;
  }

  void keep(int64_t j, const Strip<T>& values) const {
    if (factors.keep != nullptr) store_elements(values, dtype_of_arithmetic<T>, factors.keep, j * factors.n + first, valid);
  }

  Strip<T> kept(int64_t j) const { return load_elements<T>(dtype_of_arithmetic<T>, factors.kept, j * factors.n + first, valid); }

  // The non-linear part of a kernel: softmax, exponential or sigmoid.
  Strip<T> curved(const Strip<T>& mixed) const {
    Strip<T> r;
    const Lanes<T> one = every_lane(T{1}), steep = every_lane(beta), scale = every_lane(inverse_gamma);
    for (int q = 0; q < strip_parts; ++q) {
      const Lanes<T>& v = mixed.lane[q];
      if (factors.kernel == MergeKernel::mixk) {
        r.lane[q] = exponential(v * scale - row_max.lane[q]) * row_scale.lane[q];
      } else if (factors.kernel == MergeKernel::rbf) {
        r.lane[q] = exponential(every_lane(T{0}) - steep * v);
      } else {
        r.lane[q] = one / (one + exponential(every_lane(T{0}) - steep * v));
      }
    }
    return r;
  }

  Strip<T> entries(const Strip<T>& mixed, const Strip<T>& curved) const {
    Strip<T> r;
    const Lanes<T> height = every_lane(alpha);
    const bool mixk = factors.kernel == MergeKernel::mixk;
    const Lanes<T> offset = every_lane(mixk ? beta : static_cast<T>(factors.gamma));
    for (int q = 0; q < strip_parts; ++q) {
      const Lanes<T> bend = height * curved.lane[q];
      r.lane[q] = (mixk ? mixed.lane[q] + bend : bend) + offset;
    }
    return r;
  }

  bool is_curved() const { return factors.kernel != MergeKernel::linear && factors.kernel != MergeKernel::pwl; }

  Strip<T> entries(int64_t j) const {
    if (factors.kept_entries) return kept(j);
    const Strip<T> m = factors.kept == nullptr ? mixed(j, nullptr) : kept(j);
    return is_curved() ? entries(m, curved(m)) : m;
  }

  Strip<T> gated(const Strip<T>& entries) const {
    if (factors.gate == MergeGate::none) return entries;
    Strip<T> r;
    const Lanes<T> cut = every_lane(threshold), zero = every_lane(T{0}), one = every_lane(T{1});
    for (int q = 0; q < strip_parts; ++q) {
      const Lanes<T> size = absolute(entries.lane[q]);
      const Lanes<T> factor = factors.gate == MergeGate::magnitude ? size : factors.gate == MergeGate::soft ? size - cut : one;
      r.lane[q] = entries.lane[q] * where_above(size, cut, factor, zero);
    }
    return r;
  }

  // The gradient of E from that of the gated E.
  Strip<T> ungated(const Strip<T>& gradient, const Strip<T>& entries) const {
    if (factors.gate == MergeGate::none) return gradient;
    Strip<T> r;
    const Lanes<T> cut = every_lane(threshold), zero = every_lane(T{0}), one = every_lane(T{1});
    for (int q = 0; q < strip_parts; ++q) {
      const Lanes<T> size = absolute(entries.lane[q]);
      const Lanes<T> factor = factors.gate == MergeGate::magnitude ? size : factors.gate == MergeGate::soft ? size + (size - cut) : one;
      r.lane[q] = gradient.lane[q] * where_above(size, cut, factor, zero);
    }
    return r;
  }
};

}  // namespace
}  // namespace taskloom
