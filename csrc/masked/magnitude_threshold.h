// Exact k-th largest magnitudes of deltas |tuned - base| (or of plain values), by radix histograms and by a sampled bracket; no sort, no
// copy. Magnitudes are compared as the bits of their absolute value in float32 (float64 where a tensor is float64): NaN ranks above
// infinity, and of equal magnitudes the lower index is the larger. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu_level.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace taskloom {

// Bytes that drivers may keep between their passes over a tensor, where their caller does not say.
constexpr int64_t default_room = 64 << 20;

// One tensor's values, or its difference from a base (base null: the values themselves).
struct Delta {
  const void* tuned;
  const void* base;
  DType tuned_dtype;
  DType base_dtype;
};

static inline bool is_wide(const Delta& delta) {
  return delta.tuned_dtype == DType::f64 || (delta.base != nullptr && delta.base_dtype == DType::f64);
}

// The entries of rank < k: those whose magnitude bits exceed `bits`, and of those that equal it the ones with index < tie_end.
struct Cut {
  int64_t bits;
  int64_t tie_end;
};

// No bits of an absolute value exceed these, in either width's comparison.
static inline Cut cut_none(bool wide) { return {wide ? INT64_MAX : INT32_MAX, 0}; }
static inline Cut cut_all() { return {0, INT64_MAX}; }

// A cut with what it was found from: the number of entries above the threshold and how many equal to it belong to it.
struct Threshold {
  Cut cut;
  int64_t above;
  int64_t equal;       // entries whose magnitude equals the threshold
  int64_t equal_kept;  // of which the lowest `equal_kept` indices are kept
};

constexpr int64_t histogram_bins = 1 << 16;
// Room behind the magnitudes between a bracket for a whole vector's store.
constexpr int64_t vector_room = 64;

// What one pass over a chunk finds around a bracket low <= x <= high of magnitudes.
struct BracketCount {
  int64_t low, high;                              // in
  int64_t above, equal_high, equal_low, between;  // out
  void* between_bits;                             // out: bits strictly between, in order; room for a whole chunk and vector_room more
};

struct ThresholdLoops {
  // Magnitude bits of entries begin .. begin + n: int32 (int64 where wide).
  void (*magnitudes)(bool wide, const Delta& delta, int64_t begin, int64_t n, void* bits);
  // Counts around `brackets` brackets, adding to nothing: the results are set.
  void (*count_brackets)(bool wide, const Delta& delta, int64_t begin, int64_t n, BracketCount* brackets, int count);
  // Adds to counts[65536] the digit (bits >> shift) & 0xffff of the entries whose bits >> (shift + 16) equal `prefix`.
  void (*histogram)(bool wide, const Delta& delta, int64_t begin, int64_t n, int shift, int64_t prefix, int64_t* counts);
  // Rank cut of one row of magnitudes, tie_end counted from the row's start; scratch has room for n bits.
  Cut (*row_cut)(bool wide, const void* bits, int64_t n, int64_t rank, void* scratch);
  // Ascending rank of each of n < 2^31 magnitudes, of equal ones the lower index ranks higher; scratch: see row_rank_scratch.
  void (*row_ranks)(bool wide, const void* bits, int64_t n, int32_t* ranks, void* scratch);
};

static inline int64_t row_rank_scratch(bool wide, int64_t n) { return 2 * n * (wide ? 16 : 14) + 64; }

TASKLOOM_LOOPS(ThresholdLoops, threshold_loops)

// Thresholds of ranks[task * cuts + i] (0 <= rank <= numel) of `tasks` deltas of one tensor, found together so that a shared base is read
// once per chunk. `wide` compares in float64: for all deltas of a merge in which any tensor is float64. What is kept between passes takes
// `room` bytes at most (least_threshold_room at least): with less room there are more passes, and the same thresholds.
std::vector<Threshold> magnitude_thresholds(const Delta* deltas, int tasks, int64_t numel, const int64_t* ranks, int cuts, bool wide,
                                            int64_t room, const ParallelFor& parallel);

constexpr int64_t least_threshold_room = histogram_bins * static_cast<int64_t>(sizeof(int64_t));

// The most bytes that finding thresholds takes: scratch of each thread that works on them (a thread keeps it), and what the passes share.
struct ThresholdMemory {
  int64_t magnitudes, sorted_copy;  // by ScratchUse
  int64_t shared;
};

// `wanted` of the ranks, at most `cuts` of a task, lie between 0 and numel.
ThresholdMemory threshold_memory(int64_t numel, int64_t wanted, int cuts, bool wide, int64_t room);

// The same for one rank 1 <= rank <= numel, a threshold always being found.
Threshold exact_magnitude_threshold(const Delta& delta, int64_t numel, int64_t rank, bool wide, const ParallelFor& parallel);

struct DeltaSegment {
  Delta delta;
  int64_t numel;
};

// One task's delta over several tensors seen as one vector, in order: a Threshold per rank, and per rank the tie_end of each segment
// (tie_ends[rank_index * segments + segment]). Compared in float64 where `wide` or any tensor is float64.
std::vector<Threshold> joint_magnitude_thresholds(const std::vector<DeltaSegment>& segments, const std::vector<int64_t>& ranks,
                                                  std::vector<int64_t>* tie_ends, const ParallelFor& parallel, bool wide = false,
                                                  int64_t room = default_room);

// Adds the histogram of one 16-bit digit of the magnitudes to counts[65536]; see ThresholdLoops::histogram. Threads
// count into histograms of their own where they fit into `room` bytes; otherwise one thread counts.
void add_magnitude_histogram(const Delta& delta, bool wide, int64_t numel, int shift, int64_t prefix, int64_t* counts, int64_t room,
                             const ParallelFor& parallel);

// The most bytes of private histograms that this takes.
int64_t histogram_memory(int64_t numel, int64_t room);

// Thresholds of ranks[0 .. cuts) (0 <= rank <= row_length) of each row: found[row * cuts + i], tie_end counted from the row's start.
std::vector<Threshold> row_magnitude_thresholds(const Delta& delta, int64_t rows, int64_t row_length, const int64_t* ranks, int cuts,
                                                bool wide, const ParallelFor& parallel);

// The cut of a threshold that was found elsewhere, of which the `equal_kept` lowest indices that equal it are kept.
Cut cut_of_threshold(const Delta& delta, int64_t numel, int64_t bits, int64_t equal_kept, bool wide, const ParallelFor& parallel);

}  // namespace taskloom
