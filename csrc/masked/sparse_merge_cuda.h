// What the CUDA files of sparse_merge share: the tables and settings that its kernels take, and the passes that one file offers another.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_entries.h"
#include "common/cuda_launch.h"
#include "masked/magnitude_ranks_cuda.h"
#include "masked/sparse_merge.h"

namespace taskloom {

// A task as kernels read it: a row of a table in device memory.
struct DeviceTask {
  DeviceValues tuned;
  uint8_t* mask = nullptr;  // packed bits, of entries DeviceMerge::first and on
  uint64_t key = 0;
  int64_t limit = 0;  // dropout: a random word below it keeps its entry
  double weight = 1, factor = 1, tall_mask_lambda = 1;
  float lowest = 1, spread = 0;  // rank_dropout: keep probabilities are lowest + share of the ranks below * spread
};

// How kernels find which entries of a task survive. Selections by row are made beforehand, into bits or multipliers.
enum class DeviceSelect : int32_t { all, cuts, bits, dropout, multipliers };

// A merge as kernels take it. All pointers are the device's.
struct DeviceMerge {
  DeviceValues base, out;  // base.data null: values are merged onto zero
  const DeviceTask* tasks = nullptr;
  const DeviceCut* cuts = nullptr;    // [tasks][2]: what is removed, what is kept
  void* multipliers = nullptr;        // [tasks][multiplier_stride] of the arithmetic's type, of entries `first` and on; 0 where dropped
  int64_t multiplier_stride = 0;      // a multiple of 8
  const int64_t* sign_sum = nullptr;  // where zeros follow the majority
  int64_t first = 0;                  // entry at which what rows selected begins, a multiple of 8
  int64_t begin = 0, end = 0;         // entries of this launch; `begin` is a multiple of 8
  int64_t numel = 0;
  uint64_t seed = 0;
  double scale = 1, divisor = 1;
  int32_t count = 0;
  DeviceSelect select = DeviceSelect::all;
  Elect elect = Elect::none;
  int32_t zero_sign = 1;
  Vote vote = Vote::none;
  int32_t consensus_k = 0;
  Combine combine = Combine::sum;
};

__host__ __device__ inline int64_t vectors(int64_t entries) { return (entries + vector_entries - 1) / vector_entries; }

// The multipliers of one task's entries, from `first` on.
template <class Acc>
__device__ inline DeviceValues multipliers_of(const DeviceMerge& merge, int64_t t) {
  return {static_cast<Acc*>(merge.multipliers) + t * merge.multiplier_stride, sizeof(Acc) == 8 ? DType::f64 : DType::f32, 1};
}

// Merges entries begin .. end into out. `where` is any tensor of the device.
void merge_entries(const Tensor& where, bool wide, const DeviceMerge& merge);
// The same for the merges that sparse_merge_fused_cuda.cu serves, in whole vectors, where all tensors are of one dtype and aligned
// (`alike`). Returns the entry from which on nothing is merged: merge.begin where it refuses.
int64_t merge_fused(const Tensor& where, const DeviceMerge& merge, bool alike);
// Adds elected positive entries less elected negative ones to *sign_sum.
void add_elected_signs(const Tensor& where, bool wide, const DeviceMerge& merge, int64_t* sign_sum);
// Adds each task's sums of |delta| and of |selected delta| to totals[task][2], in a fixed order.
void add_norms(const Tensor& where, bool wide, const DeviceMerge& merge, double* totals);
// Sets each task's factor to the ratio of its norms.
void set_l1_factors(const Tensor& where, const double* totals, DeviceTask* tasks, int32_t count);

// What is counted beside the merge, in device memory that is zero at first.
struct MergeCounts {
  int64_t *kept, *conflicts, *sign_sum;
  uint8_t* nonfinite;
};
void add_counts(const Tensor& where, bool wide, const DeviceMerge& merge, const MergeCounts& counts);
// Inner products of the deltas into dots[tasks][tasks].
void find_dots(const Tensor& where, bool wide, const DeviceMerge& merge, double* dots);

// So many rows at a time that no two bundles share a byte of packed bits.
__host__ __device__ inline int64_t rows_of_bundle(int64_t row_length) {
  int64_t rows = vector_entries;
  for (int64_t length = row_length; rows > 1 && length % 2 == 0; length /= 2) rows /= 2;
  return rows;
}

// Selections within the rows of `length` entries that fill begin .. end of the merge.
// By bands of magnitudes, of which cuts[tasks][rows][2] are known: bits into the tasks' masks.
void select_row_bands(const Tensor& where, bool wide, const DeviceMerge& merge, int64_t length, const DeviceCut* cuts);
// rank_dropout: bits, or (where the merge has them) multipliers 1 / keep probability.
void select_rows_by_rank(const Tensor& where, bool wide, const DeviceMerge& merge, int64_t length);

}  // namespace taskloom
