// Gradients of the factors and scalars of a kernel from that of its gated entries, tile by tile; for NAME_loops.cpp files. Torch-free,
// internal linkage.
#pragma once

#include <algorithm>

#include "lowrank/kernel_strip.h"

namespace taskloom {
namespace {

// The gradient of the merged matrix at row j of [m, n] and the strip's columns; 0 past the last one.
template <class T>
inline Strip<T> gradient_strip(const KernelFactors& factors, const KernelGradients& gradients, int64_t strip, int64_t j) {
  const int64_t first = strip * strip_rows, valid = std::min(strip_rows, factors.n - first);
  alignas(64) T values[strip_rows] = {};
  load_block(gradients.dtype, gradients.gradient, j * factors.n + first, valid, values);
  return load_strip(values);
}

template <class T>
double strip_dots(const KernelFactors& factors, const KernelGradients& gradients, int64_t strip, T* row_dot) {
  const StripRows<T> rows(factors, strip);
  Strip<T> dots = every_row(T{0});
  double sum = 0;
  for (int64_t begin = 0; begin < factors.m; begin += merge_block) {
    const int64_t end = std::min(begin + merge_block, factors.m);
    Strip<T> block_dots = every_row(T{0});
    Lanes<T> block_sum = every_lane(T{0});
    for (int64_t j = begin; j < end; ++j) {
      const Strip<T> mixed = rows.mixed(j, nullptr), soft = rows.curved(mixed);
      const Strip<T> d = rows.ungated(gradient_strip<T>(factors, gradients, strip, j), rows.entries(mixed, soft));
      for (int q = 0; q < strip_parts; ++q) {
        block_dots.lane[q] = block_dots.lane[q] + soft.lane[q] * d.lane[q];
        block_sum = block_sum + d.lane[q];
      }
    }
    for (int q = 0; q < strip_parts; ++q) dots.lane[q] = dots.lane[q] + block_dots.lane[q];
    sum += static_cast<double>(sum_of_lanes(block_sum));
  }
  store_strip(row_dot, dots);
  return sum;
}

// Sums over the lanes of a few rows, before they join sums in double.
template <class T>
struct ScalarSums {
  Lanes<T> alpha = every_lane(T{0}), gamma = every_lane(T{0}), beta = every_lane(T{0});

  void add_to(double* sums) const {
    sums[0] += static_cast<double>(sum_of_lanes(alpha));
    sums[1] += static_cast<double>(sum_of_lanes(gamma));
    sums[2] += static_cast<double>(sum_of_lanes(beta));
  }
};

// What multiplies a_i - b_j (or b_j, and a_i) in the gradients at row j, the same for all chunks but for what `parts` holds; adds to
// the scalars' sums.
template <class T>
inline Strip<T> pulled(const StripRows<T>& rows, const Strip<T>& mixed, const Strip<T>& gradient, const Strip<T>& row_dot,
                       ScalarSums<T>& sums) {
  const KernelFactors& f = rows.factors;
  if (!rows.is_curved()) return rows.ungated(gradient, mixed);
  const Strip<T> curved = rows.curved(mixed);
  Strip<T> d = rows.ungated(gradient, rows.entries(mixed, curved));
  const Lanes<T> alpha = every_lane(rows.alpha), beta = every_lane(rows.beta), one = every_lane(T{1}),
                 scale = every_lane(rows.inverse_gamma);
  for (int q = 0; q < strip_parts; ++q) {
    const Lanes<T> bend = curved.lane[q], from = d.lane[q];
    if (f.kernel == MergeKernel::mixk) {
      const Lanes<T> soft = alpha * bend * (from - row_dot.lane[q]);
      // A row's `soft` add up to 0, so that any multiple of a row may be taken off M / gamma: the largest leaves least to cancel.
      sums.gamma = sums.gamma + soft * (mixed.lane[q] * scale - rows.row_max.lane[q]);
      d.lane[q] = from + soft * scale;
    } else if (f.kernel == MergeKernel::rbf) {
      const Lanes<T> e = from * bend, fall = alpha * e;
      sums.alpha = sums.alpha + e;
      sums.beta = sums.beta - fall * mixed.lane[q];
      sums.gamma = sums.gamma + from;
      d.lane[q] = (every_lane(T{-2}) * beta) * fall;
    } else {
      const Lanes<T> slope = alpha * from * (bend * (one - bend));
      sums.alpha = sums.alpha + from * bend;
      sums.beta = sums.beta + slope * mixed.lane[q];
      sums.gamma = sums.gamma + from;
      d.lane[q] = beta * slope;
    }
  }
  return d;
}

// Adds weight * (a - b), or weight * b and weight * a, to the gradients of one chunk. The lanes of those of b are added up later.
template <class T>
inline void add_pulls(bool distance, const T* a, const T* b, int64_t width, const Strip<T>& weight, T* a_gradient, T* b_gradient) {
  for (int64_t k = 0; k < width; ++k) {
    const Lanes<T> other = every_lane(b[k]);
    Lanes<T> sum = load_lanes(b_gradient + k * lanes);
    for (int q = 0; q < strip_parts; ++q) {
      const Lanes<T> own = load_lanes(a + k * strip_rows + q * lanes);
      T* to = a_gradient + k * strip_rows + q * lanes;
      if (distance) {
        const Lanes<T> pull = weight.lane[q] * (own - other);
        store_lanes(to, load_lanes(to) + pull);
        sum = sum - pull;
      } else {
        store_lanes(to, load_lanes(to) + weight.lane[q] * other);
        sum = sum + weight.lane[q] * own;
      }
    }
    store_lanes(b_gradient + k * lanes, sum);
  }
}

template <class T>
void tile_backward(const KernelFactors& factors, const KernelGradients& gradients, int64_t strip_begin, int64_t strip_end, int64_t j_begin,
                   int64_t j_end, double* sums, T* scratch) {
  const MergeKernel kernel = factors.kernel;
  const bool distance = kernel != MergeKernel::linear && kernel != MergeKernel::sigmoid;
  const bool weighted = kernel != MergeKernel::rbf && kernel != MergeKernel::sigmoid;
  const int64_t chunks = factors.chunks, width = factors.width, values = chunks * width;
  T* const parts = scratch;
  T* const coef_sums = parts + chunks * strip_rows;
  T* const a_block = coef_sums + chunks * strip_rows;
  T* const b_block = a_block + values * strip_rows;
  for (int64_t begin = j_begin; begin < j_end; begin += merge_block) {
    const int64_t end = std::min(begin + merge_block, j_end);
    std::fill(b_block, b_block + (end - begin) * values * lanes, T{0});
    for (int64_t strip = strip_begin; strip < strip_end; ++strip) {
      const StripRows<T> rows(factors, strip);
      const Strip<T> row_dot =
          kernel == MergeKernel::mixk ? load_strip(static_cast<const T*>(gradients.row_dot) + strip * strip_rows) : every_row(T{0});
      ScalarSums<T> scalars;
      std::fill(coef_sums, coef_sums + chunks * lanes, T{0});
      std::fill(a_block, a_block + values * strip_rows, T{0});
      for (int64_t j = begin; j < end; ++j) {
        const Strip<T> gradient = gradient_strip<T>(factors, gradients, strip, j);
        const Strip<T> mixed = rows.mixed(j, parts);
        const Strip<T> pull = pulled(rows, mixed, gradient, row_dot, scalars);
        for (int64_t p = 0; p < chunks; ++p) {
          Strip<T> weight = pull;
          if (weighted) {
            const Lanes<T> scale = every_lane(rows.coef[p]);
            Lanes<T> coef_sum = load_lanes(coef_sums + p * lanes);
            for (int q = 0; q < strip_parts; ++q) {
              const Lanes<T> part = load_lanes(parts + p * strip_rows + q * lanes);
              coef_sum = coef_sum + pull.lane[q] * part;
              const Lanes<T> scaled = scale * pull.lane[q];
              weight.lane[q] = distance ? where_zero(part, every_lane(T{0}), scaled / part) : scaled;
            }
            store_lanes(coef_sums + p * lanes, coef_sum);
          }
          add_pulls(distance, rows.a_chunk(p), rows.b_row(p, j), width, weight, a_block + p * width * strip_rows,
                    b_block + ((j - begin) * chunks + p) * width * lanes);
        }
      }
      for (int64_t p = 0; p < chunks; ++p) sums[p] += static_cast<double>(sum_of_lanes(load_lanes(coef_sums + p * lanes)));
      scalars.add_to(sums + chunks);
      T* const a = static_cast<T*>(gradients.a) + strip * values * strip_rows;
      for (int64_t i = 0; i < values * strip_rows; ++i) a[i] += a_block[i];
    }
    T* const b = static_cast<T*>(gradients.b);
    for (int64_t j = begin; j < end; ++j)
      for (int64_t p = 0; p < chunks; ++p)
        for (int64_t k = 0; k < width; ++k) {
          b[(p * factors.m + j) * width + k] += sum_of_lanes(load_lanes(b_block + (((j - begin) * chunks + p) * width + k) * lanes));
        }
  }
}

}  // namespace
}  // namespace taskloom
