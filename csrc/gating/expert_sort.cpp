// Two passes over the ids: counts of each chunk, then places. What a chunk's entries get follows from the counts of the chunks before it,
// so that the order is stable and chunks need not wait for each other.
#include "gating/expert_sort.h"

#include <algorithm>
#include <atomic>

namespace taskloom {
namespace {

// Counts the experts of entries begin .. end; the first place of an id that is out of range, or `end`.
template <class Index>
int64_t count_experts(const ExpertSort& sort, int64_t begin, int64_t end, int32_t* counts) {
  std::fill(counts, counts + sort.experts, 0);
  for (int64_t place = begin; place < end; ++place) {
    const int64_t expert = load_at<Index>(sort.ids.data, place);
    if (static_cast<uint64_t>(expert) >= static_cast<uint64_t>(sort.experts)) return place;
    ++counts[expert];
  }
  return end;
}

template <class Index>
void place_entries(const ExpertSort& sort, int64_t begin, int64_t end, int32_t* next) {
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t expert = load_at<Index>(sort.ids.data, entry);
    // Ids that another thread changes meanwhile must not lead out of the results.
    if (static_cast<uint64_t>(expert) >= static_cast<uint64_t>(sort.experts)) continue;
    const int32_t place = next[expert]++;
    if (place >= sort.entries) continue;
    sort.order[place] = static_cast<int32_t>(entry);
    sort.inverse[entry] = place;
  }
}

// Turns the chunks' counts into the first places of their entries.
void add_up(const ExpertSort& sort, int64_t chunks, int32_t* counts) {
  int32_t* const next = sort.offsets + 1;
  std::fill(sort.offsets, next + sort.experts, 0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t expert = 0; expert < sort.experts; ++expert) next[expert] += counts[chunk * sort.experts + expert];
  }
  int32_t before = 0;
  for (int64_t expert = 0; expert < sort.experts; ++expert) {
    const int32_t own = next[expert];
    next[expert] = before;
    before += own;
  }
  // What is added here makes the first place of each expert the first of the next one.
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t expert = 0; expert < sort.experts; ++expert) {
      const int32_t own = counts[chunk * sort.experts + expert];
      counts[chunk * sort.experts + expert] = next[expert];
      next[expert] += own;
    }
  }
}

template <class Index>
int64_t sort_as(const ParallelFor& parallel, const ExpertSort& sort, int32_t* counts) {
  const int64_t size = expert_sort_chunk(sort.experts), chunks = chunk_count(sort.entries, size);
  std::atomic<int64_t> wrong{sort.entries};
  parallel(chunks, [&](int64_t chunk) {
    const int64_t begin = chunk * size, end = std::min(begin + size, sort.entries);
    const int64_t reached = count_experts<Index>(sort, begin, end, counts + chunk * sort.experts);
    int64_t known = wrong.load();
    while (reached < end && reached < known && !wrong.compare_exchange_weak(known, reached)) {
    }
  });
  if (wrong.load() < sort.entries) return wrong.load();
  add_up(sort, chunks, counts);
  parallel(chunks, [&](int64_t chunk) {
    const int64_t begin = chunk * size;
    place_entries<Index>(sort, begin, std::min(begin + size, sort.entries), counts + chunk * sort.experts);
  });
  return -1;
}

}  // namespace

int64_t sort_by_expert(const ParallelFor& parallel, const ExpertSort& sort, int32_t* counts) {
  return sort.ids.wide ? sort_as<int64_t>(parallel, sort, counts) : sort_as<int32_t>(parallel, sort, counts);
}

void fill_blocks(const ParallelFor& parallel, const ExpertSort& sort, const ExpertBlocks& blocks) {
  int32_t place = 0;
  for (int64_t expert = 0; expert < sort.experts; ++expert) {
    blocks.padded_offsets[expert] = place;
    const int64_t entries = sort.offsets[expert + 1] - sort.offsets[expert];
    place += static_cast<int32_t>(chunk_count(entries, blocks.block) * blocks.block);
  }
  blocks.padded_offsets[sort.experts] = place;
  // Experts together, so that a task has some thousand entries to copy.
  const int64_t tasks = std::clamp<int64_t>(blocks.size / 16384, 1, sort.experts);
  const auto nothing = static_cast<int32_t>(sort.entries);
  parallel(tasks, [&](int64_t task) {
    for (int64_t expert = sort.experts * task / tasks; expert < sort.experts * (task + 1) / tasks; ++expert) {
      const int32_t begin = blocks.padded_offsets[expert], end = blocks.padded_offsets[expert + 1];
      int32_t* const filled =
          std::copy(sort.order + sort.offsets[expert], sort.order + sort.offsets[expert + 1], blocks.padded_order + begin);
      std::fill(filled, blocks.padded_order + end, nothing);
      std::fill(blocks.block_expert + begin / blocks.block, blocks.block_expert + end / blocks.block, static_cast<int32_t>(expert));
    }
  });
  std::fill(blocks.padded_order + place, blocks.padded_order + blocks.size, nothing);
  std::fill(blocks.block_expert + place / blocks.block, blocks.block_expert + blocks.size / blocks.block, -1);
}

}  // namespace taskloom
