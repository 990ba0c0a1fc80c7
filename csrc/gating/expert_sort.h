// expert_sort: the stable order of entries by expert, by counting. Torch-free.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "gating/indices.h"

namespace taskloom {

struct ExpertSort {
  Indices ids;
  int64_t entries, experts;
  int32_t *order, *inverse;  // [entries]
  int32_t* offsets;          // [experts + 1]
};

// Entries of a chunk: each has counts of its own, whose addition should cost less than the chunk's counting.
constexpr int64_t expert_sort_chunk(int64_t experts) { return experts * 4 > 32768 ? experts * 4 : 32768; }

// Fills order, inverse and offsets. `counts` is room for experts per chunk. Returns the place of the first id that is out of range, and
// then nothing is filled; else -1.
int64_t sort_by_expert(const ParallelFor& parallel, const ExpertSort& sort, int32_t* counts);

struct ExpertBlocks {
  int64_t block, size;      // entries of a block, and of the padded order
  int32_t* padded_order;    // [size]
  int32_t* padded_offsets;  // [experts + 1]
  int32_t* block_expert;    // [size / block]
};

// The most entries that the experts' runs can take in whole blocks.
constexpr int64_t padded_size(int64_t entries, int64_t experts, int64_t block) {
  return (entries + (entries < experts ? entries : experts) * (block - 1)) / block * block;
}

// The same order in whole blocks.
void fill_blocks(const ParallelFor& parallel, const ExpertSort& sort, const ExpertBlocks& blocks);

}  // namespace taskloom
