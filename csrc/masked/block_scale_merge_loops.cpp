// CPU loops of block_scale_merge and its backward, compiled once per CPU level.
#include "common/convert.h"
#include "masked/block_scale_merge.h"

namespace taskloom {
namespace {

constexpr int64_t step = 512;
constexpr int64_t dot_lanes = 16;

// group[] of entries at .. at + n, kept below the number of groups; the largest that was there.
inline int32_t load_groups(const ScaleBlock& block, int64_t at, int64_t n, int32_t* __restrict__ group) {
  const uint8_t* __restrict__ from = block.partition + at;
  const auto last = static_cast<int32_t>(block.groups - 1);
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t value = from[i];
    largest = value > largest ? value : largest;
    group[i] = value < last ? value : last;
  }
  return largest;
}

template <class Acc>
int32_t merge_of(const ScaleBlock& block, int64_t begin, int64_t n) {
  alignas(64) Acc base[step], delta[step], sum[step];
  alignas(64) int32_t group[step];
  int32_t largest = 0;
  for (int64_t done = 0; done < n; done += step) {
    const int64_t at = begin + done, size = n - done < step ? n - done : step;
    if (block.partition != nullptr) {
      const int32_t here = load_groups(block, at, size, group);
      largest = here > largest ? here : largest;
    }
    load_block(block.base.dtype, block.base.data, at, size, base);
    for (int64_t i = 0; i < size; ++i) sum[i] = Acc{0};
    for (int64_t t = 0; t < block.tasks; ++t) {
      const Elements& task = block.deltas[t * block.delta_stride];
      const Acc* __restrict__ coef = static_cast<const Acc*>(block.coef) + t * block.coef_stride;
      const int64_t ahead = n - done - size < step ? n - done - size : step;
      prefetch_block(task.dtype, task.data, at + size, ahead);
      load_block(task.dtype, task.data, at, size, delta);
      if (block.partition == nullptr || block.groups == 1) {
        const Acc factor = coef[0];
        for (int64_t i = 0; i < size; ++i) {
          const Acc product = factor * delta[i];
          sum[i] += product;
        }
      } else {
        for (int64_t i = 0; i < size; ++i) {
          const Acc product = coef[group[i]] * delta[i];
          sum[i] += product;
        }
      }
    }
    for (int64_t i = 0; i < size; ++i) sum[i] = base[i] + sum[i];
    store_block(block.base.dtype, sum, size, block.out, at);
  }
  return largest;
}

int32_t merge(bool wide, const ScaleBlock& block, int64_t begin, int64_t n) {
  return wide ? merge_of<double>(block, begin, n) : merge_of<float>(block, begin, n);
}

// The inner product over a step; both arrays are zero from n up to a multiple of dot_lanes.
inline double dot(const double* __restrict__ a, const double* __restrict__ b, int64_t n) {
  double sums[dot_lanes] = {};
  for (int64_t i = 0; i < n; i += dot_lanes) {
    for (int64_t lane = 0; lane < dot_lanes; ++lane) {
      const double product = a[i + lane] * b[i + lane];
      sums[lane] += product;
    }
  }
  double total = 0;
  for (int64_t lane = 0; lane < dot_lanes; ++lane) total += sums[lane];
  return total;
}

int32_t dots(const ScaleBlock& block, int64_t begin, int64_t n, double* sums, double* scratch) {
  alignas(64) double gradient[step], delta[step];
  alignas(64) int32_t group[step];
  const int64_t groups = block.groups;
  const bool grouped = block.partition != nullptr && groups > 1;
  int32_t largest = 0;
  for (int64_t i = 0; i < block.tasks * groups; ++i) sums[i] = 0;
  if (grouped) {
    for (int64_t i = 0; i < block.tasks * scale_lanes * groups; ++i) scratch[i] = 0;
  }
  for (int64_t done = 0; done < n; done += step) {
    const int64_t at = begin + done, size = n - done < step ? n - done : step;
    const int64_t padded = (size + dot_lanes - 1) / dot_lanes * dot_lanes;
    if (block.partition != nullptr) {
      const int32_t here = load_groups(block, at, size, group);
      largest = here > largest ? here : largest;
    }
    load_block(block.base.dtype, block.base.data, at, size, gradient);
    for (int64_t i = size; i < padded; ++i) gradient[i] = delta[i] = 0;
    for (int64_t t = 0; t < block.tasks; ++t) {
      const Elements& task = block.deltas[t * block.delta_stride];
      const int64_t ahead = n - done - size < step ? n - done - size : step;
      prefetch_block(task.dtype, task.data, at + size, ahead);
      load_block(task.dtype, task.data, at, size, delta);
      if (!grouped) {
        sums[t * groups] += dot(gradient, delta, padded);
        continue;
      }
      for (int64_t i = 0; i < size; ++i) delta[i] = gradient[i] * delta[i];
      // Neighbours add to different sums, so that one add need not wait for the last.
      double* __restrict__ lanes = scratch + t * scale_lanes * groups;
      for (int64_t i = 0; i < size; ++i) lanes[(i % scale_lanes) * groups + group[i]] += delta[i];
    }
  }
  if (!grouped) return largest;
  for (int64_t t = 0; t < block.tasks; ++t) {
    for (int64_t lane = 0; lane < scale_lanes; ++lane) {
      const double* from = scratch + (t * scale_lanes + lane) * groups;
      for (int64_t k = 0; k < groups; ++k) sums[t * groups + k] += from[k];
    }
  }
  return largest;
}

const BlockScaleMergeLoops table = {merge, dots};

}  // namespace

TASKLOOM_EXPORT_LOOPS(BlockScaleMergeLoops, block_scale_merge_loops, table)

}  // namespace taskloom
