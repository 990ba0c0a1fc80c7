// What a search for ranks of magnitudes is asked, and where its results go.
#pragma once

#include <vector>

#include "masked/magnitude_ranks_cuda.h"

namespace taskloom {

struct QuerySegment {
  DeviceDelta delta;
  int64_t numel;
};

// Ranks of tensors seen as one vector, in order. A rank of 0 finds nothing: all bits set, none kept. One beyond numel stands for
// everything.
struct RankQuery {
  std::vector<QuerySegment> segments;
  int64_t numel;
  std::vector<int64_t> ranks;
};

// The ranks of a query for cuts: that of all entries need not know their smallest magnitude.
inline std::vector<int64_t> ranks_of_cuts(std::vector<int64_t> ranks, int64_t numel) {
  for (int64_t& rank : ranks) {
    if (rank == numel && rank > 0) ++rank;
  }
  return ranks;
}

// Device memory that takes what is found, in the order of the queries' ranks, from entry `first` on. Null: not wanted.
struct SearchOutputs {
  DeviceCut* cuts = nullptr;  // of vectors of one segment alone
  void* thresholds = nullptr;
  int64_t* kept = nullptr;
  int64_t first = 0;
};

// Thresholds found elsewhere, in device memory.
struct GivenThresholds {
  const void* thresholds = nullptr;
  DType dtype = DType::f32;
  const int64_t* kept = nullptr;
};

// Ranks within each row of each delta, ranks[delta * cuts + i]; outputs as [deltas, rows, cuts], tie ends counted from the row's start.
void find_row_ranks(const Tensor& where, const std::vector<DeviceDelta>& deltas, int64_t rows, int64_t row_length,
                    const std::vector<int64_t>& ranks, int cuts, bool wide, const SearchOutputs& outputs);

void find_ranks(const Tensor& where, const std::vector<RankQuery>& queries, bool wide, const SearchOutputs& outputs);

}  // namespace taskloom
