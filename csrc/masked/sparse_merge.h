// sparse_merge: base + scale * combine(elect(select(tuned - base))), one pass over base and tuned tensors, deltas never stored.
// Arithmetic is float32 (float64 where a tensor is float64), tasks in order 0..T-1, each product rounded before its add. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/thread_scratch.h"
#include "masked/magnitude_threshold.h"

namespace taskloom {

class PageBuffer;

enum class Select : int32_t { all, magnitude, row_magnitude, mask, dropout, rank_dropout };
enum class Rescale : int32_t { none, density, l1 };
enum class Elect : int32_t { none, sign_sum, sign_count };
enum class Vote : int32_t { none, selected, tall };
enum class Combine : int32_t { sum, weighted_mean, disjoint_mean };

// Task t's random words have the tensor's key plus t times this.
constexpr uint64_t task_key_step = 0x9E3779B97F4A7C15ull;
// Ranks within a row are 32-bit.
constexpr int64_t longest_ranked_row = INT32_MAX;

struct MergeTask {
  const void* tuned = nullptr;
  DType dtype = DType::f32;
  double weight = 1;
  // magnitude: kept are the entries inside `outer` and not inside `inner`; row_magnitude: the same by ranks within a row.
  Cut outer{}, inner{};
  int64_t rank_begin = 0, rank_end = 0;
  const uint8_t* mask = nullptr;  // packed, least significant bit first
  double density = 1, epsilon = 0;
  uint64_t key = 0;  // of the random words
  double tall_mask_lambda = 1;
  double factor = 1;  // what survivors are multiplied by, found before the pass (l1) or from the density
  // Packed bits of what was selected: written by the pass that finds l1 factors, and read instead of selecting anew.
  uint8_t* record = nullptr;
  const uint8_t* recorded = nullptr;
};

struct SparseMerge {
  const void* base = nullptr;     // null: values are merged instead of deltas, onto zero
  DType base_dtype = DType::f32;  // without a base too
  DType out_dtype = DType::f32;
  int64_t numel = 0;
  int64_t row_length = 0;  // of row_magnitude and rank_dropout; divides numel
  std::vector<MergeTask> tasks;
  Select select = Select::all;
  Rescale rescale = Rescale::none;
  Elect elect = Elect::none;
  int zero_sign = 1;  // sign that an election of exactly zero takes
  Vote vote = Vote::none;
  int consensus_k = 0;
  Combine combine = Combine::sum;
  double scale = 1;
  uint64_t seed = 0;
  bool statistics = false;  // fill conflicts and dots
  bool exact_dots = false;  // every inner product from every entry, however many tasks there are
  // Bytes that may be kept between passes: magnitudes near a threshold, or the bits that were selected at random, which are selected
  // twice where they do not fit. The result does not depend on it.
  int64_t room = default_room;
  std::shared_ptr<PageBuffer> records;  // memory of the tasks' `record`

  // Whether any tensor is float64: then all deltas are taken and compared in float64.
  bool wide() const {
    bool wide = base_dtype == DType::f64;
    for (const MergeTask& task : tasks) wide = wide || task.dtype == DType::f64;
    return wide;
  }
  Delta delta(std::size_t task) const { return {tasks[task].tuned, base, tasks[task].dtype, base_dtype}; }
  bool by_row() const { return select == Select::row_magnitude || select == Select::rank_dropout; }
};

// What a pass counts. `dots` is the upper triangle, row by row, of the tasks' inner products; where there are more than 8 tasks and not
// `exact_dots` its off-diagonal entries come from every dot_stride-th block, scaled up.
struct MergeStatistics {
  std::vector<int64_t> kept;
  int64_t conflicts = 0;
  std::vector<double> dots;
  bool nonfinite = false;
};

// What one chunk adds; arrays belong to the caller.
struct ChunkStatistics {
  int64_t* kept;
  double* dots;
  double* before;  // sum |delta| per task
  double* after;   // sum |selected delta| per task
  int64_t conflicts;
  int64_t sign_sum;  // elected positive entries less elected negative ones
  int32_t nonfinite;
};

// A plain copy of SparseMerge for the loops, which use no container.
struct MergeView {
  const void* base;
  DType base_dtype, out_dtype;
  int64_t row_length;
  const MergeTask* tasks;
  int count;
  Select select;
  Rescale rescale;
  Elect elect;
  int zero_sign;
  Vote vote;
  int consensus_k;
  Combine combine;
  double scale;
  uint64_t seed;
  bool statistics;
  int dot_stride;
};

enum class MergePass : int32_t { merge, norms, signs };

struct SparseMergeLoops {
  int64_t (*scratch_bytes)(bool wide, const MergeView& merge);
  // Entries begin .. begin + n (whole rows where selection is by row) into `out`, which starts at entry `begin`.
  void (*chunk)(bool wide, MergePass pass, const MergeView& merge, int64_t begin, int64_t n, void* scratch, void* out,
                ChunkStatistics* statistics);
  // Inner products <a,a>, <a,b>, <b,b> of two plain tensors over begin .. begin + n, in double.
  void (*inner_products)(const MergeTask& a, const MergeTask& b, int64_t begin, int64_t n, double* sums);
  void (*convert)(DType from_dtype, const void* from, int64_t begin, int64_t n, DType to_dtype, void* to);
  bool (*any_nonfinite)(DType dtype, const void* values, int64_t n);
};

TASKLOOM_LOOPS(SparseMergeLoops, sparse_merge_loops)

// Where the result goes: memory, or (data null) finished chunks in any order.
struct MergeOutput {
  void* data = nullptr;
  void (*write)(void* context, int64_t byte_offset, const void* chunk, int64_t bytes) = nullptr;
  void* context = nullptr;
};

// The most bytes that a merge takes besides its tensors: scratch of each thread that works on it, by ScratchUse, and what is shared between
// its passes. No more threads than it has chunks work on it.
struct MergeMemory {
  int64_t scratch[static_cast<int>(ScratchUse::count)] = {};
  int64_t shared = 0, totals = 0, chunks = 0;
};
MergeMemory merge_memory(const SparseMerge& merge);

// Sets each task's `outer` and `inner` cuts from its ranks, for Select::magnitude over the whole tensor.
void find_magnitude_cuts(SparseMerge* merge, const ParallelFor& parallel);
// Sets each task's `factor` for its rescale mode (a pass over the inputs for l1, which also records what was selected at random).
void set_rescale_factors(SparseMerge* merge, const ParallelFor& parallel);
// Frees what was recorded; the merge selects anew.
void drop_records(SparseMerge* merge);
// Elected positive entries less elected negative ones: what `zero_sign` is taken from when zeros follow the majority.
int64_t elected_sign_sum(const SparseMerge& merge, const ParallelFor& parallel);
MergeStatistics sparse_merge(const SparseMerge& merge, const MergeOutput& output, const ParallelFor& parallel);
// Turns a merge of base and one tuned tensor into their spherical interpolation at t: a weighted sum of two tensors' values.
SparseMerge slerp_merge(const SparseMerge& merge, double t, const ParallelFor& parallel);
// Scratch of each thread that works on convert_tensor, for ScratchUse::output.
int64_t convert_scratch(int64_t numel, DType to_dtype);
void convert_tensor(DType from_dtype, const void* from, int64_t numel, DType to_dtype, const MergeOutput& output,
                    const ParallelFor& parallel);

}  // namespace taskloom
