// Matrices that a kernel makes of two thin factors, gated by a threshold of their magnitudes: E[i, j] for rows i of A and rows j of B,
// never stored. Entries of E are generated in strips of rows i for one j at a time, in the same arithmetic in every pass. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom {

enum class MergeKernel : int { linear, pwl, sigmoid, rbf, mixk };
enum class MergeGate : int { none, magnitude, soft, hard };

// Rows i in one strip: the unit in which A, its gradient and what belongs to a row are stored.
constexpr int64_t strip_rows = 64;
// Rows j whose sums are kept apart before they join longer ones, for accuracy.
constexpr int64_t merge_block = 16;

constexpr int64_t histogram_bits = 16;

// Everything is float, or double where `wide`.
struct KernelFactors {
  bool wide;
  MergeKernel kernel;
  MergeGate gate;
  int64_t chunks, n, m, width;
  const void* a;     // [strips, chunks, width, strip_rows]; rows past n repeat the last one
  const void* b;     // [chunks, m, width]
  const void* coef;  // [chunks]
  double alpha, gamma, beta;
  const void* row_max;  // mixk: [strips * strip_rows] each, of M / gamma over j and of its exponentials
  const void* row_sum;
  double threshold;
  // Room for a value of every entry, [m, n] in the arithmetic's dtype, or null. A pass over all of them writes to `keep` what the next one
  // reads as `kept` instead of making it again: row_stats what comes before the softmax, bracket E itself.
  void* keep;
  const void* kept;
  bool kept_entries;  // whether `kept` holds E

  int64_t strips() const { return (n + strip_rows - 1) / strip_rows; }
};

// Sums of a tile in the order of summation: one per chunk for coef, then alpha, gamma, beta.
struct KernelGradients {
  const void* gradient;  // [m, n], of the merged matrix
  DType dtype;
  const void* row_dot;  // mixk: [strips * strip_rows], sum_j softmax * dE
  void* a;              // as the factor; added to
  void* b;              // [chunks, m, width]; added to
};

// Magnitudes between two others, by their bits, which order as they do; the ends belong to it.
struct MagnitudeBracket {
  uint64_t low, high;
  uint64_t largest;       // of all that passed
  int64_t below, inside;  // how many passed
  void* found;            // the bits of those inside, 4 or 8 bytes each
  int64_t room;           // of `found`; complete while inside + strip_rows <= room

  bool is_complete() const { return inside + strip_rows <= room; }
};

constexpr int64_t sample_stride = 4;

struct KernelMergeLoops {
  // A [chunks, n, width] to its strips, and strips to A.
  void (*pack)(bool wide, const void* a, int64_t chunks, int64_t n, int64_t width, void* strips);
  void (*unpack)(bool wide, const void* strips, int64_t chunks, int64_t n, int64_t width, void* a);
  // Maximum and sum of exponentials of a strip's rows, to the strip's places.
  void (*row_stats)(const KernelFactors& factors, int64_t strip, void* row_max, void* row_sum);
  // Adds entries of a strip to a histogram of the 2^16 values of |E|'s bits from `shift` up, among entries whose bits above these are
  // `prefix`; returns the least bits of an entry whose prefix is larger (all ones where there is none).
  uint64_t (*histogram)(const KernelFactors& factors, int64_t strip, int shift, uint64_t prefix, int64_t* counts);
  // Bits of |E| of every `sample_stride`-th row of a strip from row `first` on, at one j, to `bits`; returns how many.
  int64_t (*sample)(const KernelFactors& factors, int64_t strip, int64_t j, int64_t first, void* bits);
  // Passes the magnitudes of a strip at rows j through a bracket.
  void (*bracket)(const KernelFactors& factors, int64_t strip, int64_t j_begin, int64_t j_end, MagnitudeBracket* bracket);
  // out[j, i] = base[j, i] + gated E for a strip and rows j of [m, n] matrices; base may be null.
  void (*merge)(const KernelFactors& factors, int64_t strip, int64_t j_begin, int64_t j_end, Elements base, DType dtype, void* out);
  // Sums over j of softmax * dE for a strip's rows, and the sum of dE.
  double (*row_dots)(const KernelFactors& factors, const KernelGradients& gradients, int64_t strip, void* row_dot);
  // Adds what a tile gives to the gradients of its rows of A and of B, and to `sums` [chunks + 3].
  // `scratch`: backward_scratch() values.
  void (*backward)(const KernelFactors& factors, const KernelGradients& gradients, int64_t strip_begin, int64_t strip_end, int64_t j_begin,
                   int64_t j_end, double* sums, void* scratch);
};

inline int64_t backward_scratch(const KernelFactors& factors) {
  return factors.chunks * (factors.width + 2) * strip_rows + factors.chunks * factors.width * merge_block * 16;
}

TASKLOOM_LOOPS(KernelMergeLoops, kernel_merge_loops)

}  // namespace taskloom
