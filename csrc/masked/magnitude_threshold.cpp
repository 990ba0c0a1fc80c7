// Drivers of magnitude_threshold: a sampled bracket and one counting pass find a threshold; where the sample misled (or over a whole
// model) exact radix histograms do.
#include "masked/magnitude_threshold.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "common/page_buffer.h"
#include "masked/magnitude_brackets.h"
#include "masked/magnitude_chunks.h"

namespace taskloom {
namespace {

// Up to here all magnitudes are copied and partially sorted: cheaper than a sample and a pass.
constexpr int64_t small = 1 << 16;
// Private histograms of a pass: a fixed number, whatever the threads.
constexpr int64_t most_parts = 16;
constexpr int64_t histogram_bytes = histogram_bins * static_cast<int64_t>(sizeof(int64_t));

Threshold trivial(bool wide, int64_t numel, int64_t rank) {
  if (rank <= 0) return {cut_none(wide), 0, 0, 0};
  return {cut_all(), numel, 0, 0};
}

// All entries of ranks strictly between 0 and numel, by a partial sort of a copy.
template <class Bits>
Threshold from_copy(const Bits* magnitudes, int64_t numel, int64_t rank, Bits* copy) {
  std::copy_n(magnitudes, numel, copy);
  std::nth_element(copy, copy + (rank - 1), copy + numel, std::greater<Bits>());
  const Bits bits = copy[rank - 1];
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < numel; ++i) {
    above += magnitudes[i] > bits;
    equal += magnitudes[i] == bits;
  }
  int64_t left = rank - above;
  Threshold found{{bits, INT64_MAX}, above, equal, left};
  if (left == equal) return found;
  for (int64_t i = 0;; ++i) {
    if (magnitudes[i] == bits && --left == 0) {
      found.cut.tie_end = i + 1;
      return found;
    }
  }
}

template <class Bits>
void small_thresholds(const Delta& delta, int64_t numel, const int64_t* ranks, int cuts, Threshold* out) {
  constexpr bool wide = sizeof(Bits) == 8;
  const ThreadScratch magnitudes(ScratchUse::magnitudes, numel * static_cast<int64_t>(sizeof(Bits)));
  const ThreadScratch copy(ScratchUse::sorted_copy, numel * static_cast<int64_t>(sizeof(Bits)));
  threshold_loops().magnitudes(wide, delta, 0, numel, magnitudes.data());
  for (int i = 0; i < cuts; ++i) {
    if (ranks[i] > 0 && ranks[i] < numel) out[i] = from_copy(magnitudes.as<Bits>(), numel, ranks[i], copy.as<Bits>());
  }
}

// The digits of a threshold, most significant first, by histograms over all chunks. Values that change between two passes give a wrong
// threshold, and no digit below 0.
template <class Histogram>
Threshold by_histograms(bool wide, int64_t rank, const Histogram& histogram) {
  const PageBuffer memory(histogram_bytes);
  auto* counts = reinterpret_cast<int64_t*>(memory.data());
  int64_t prefix = 0, above = 0, equal = 0;
  for (int shift = wide ? 48 : 16; shift >= 0; shift -= 16) {
    std::fill_n(counts, histogram_bins, 0);
    histogram(shift, prefix, counts);
    int64_t digit = histogram_bins - 1;
    while (digit > 0 && above + counts[digit] < rank) above += counts[digit--];
    prefix = (prefix << 16) | digit;
    equal = counts[digit];
  }
  return {{prefix, INT64_MAX}, above, equal, rank - above};
}

// 0 where the entries are counted without private histograms.
int64_t histogram_parts(int64_t numel, int64_t room) {
  const int64_t parts = std::min({chunk_count(numel, threshold_chunk), most_parts, room / histogram_bytes});
  return parts > 1 ? parts : 0;
}

std::vector<int64_t> equal_per_chunk(bool wide, const Delta& delta, int64_t numel, int64_t bits, const ParallelFor& parallel) {
  std::vector<int64_t> equal(static_cast<size_t>(chunk_count(numel, threshold_chunk)));
  parallel(static_cast<int64_t>(equal.size()), [&](int64_t index) {
    const ChunkRange range = chunk_range(index, numel);
    // An empty bracket: nothing lies between, so no room is needed for it.
    BracketCount count{bits, bits, 0, 0, 0, 0, nullptr};
    threshold_loops().count_brackets(wide, delta, range.begin, range.length, &count, 1);
    equal[static_cast<size_t>(index)] = count.equal_high;
  });
  return equal;
}

Threshold exact_threshold(bool wide, const Delta& delta, int64_t numel, int64_t rank, int64_t room, const ParallelFor& parallel) {
  Threshold found = by_histograms(wide, rank, [&](int shift, int64_t prefix, int64_t* counts) {
    add_magnitude_histogram(delta, wide, numel, shift, prefix, counts, room - histogram_bytes, parallel);
  });
  if (found.equal_kept == found.equal) return found;
  const std::vector<int64_t> equal = equal_per_chunk(wide, delta, numel, found.cut.bits, parallel);
  found.cut.tie_end =
      locate_tie(wide, delta, numel, found.cut.bits, found.equal_kept, [&](int64_t c) { return equal[static_cast<size_t>(c)]; });
  return found;
}

}  // namespace

std::vector<Threshold> magnitude_thresholds(const Delta* deltas, int tasks, int64_t numel, const int64_t* ranks, int cuts, bool wide,
                                            int64_t room, const ParallelFor& parallel) {
  std::vector<Threshold> found(static_cast<size_t>(tasks * cuts));
  std::vector<WantedRank> wanted;
  std::vector<size_t> places;
  for (int task = 0; task < tasks; ++task) {
    for (int cut = 0; cut < cuts; ++cut) {
      const int64_t rank = ranks[task * cuts + cut];
      const auto place = static_cast<size_t>(task * cuts + cut);
      if (rank <= 0 || rank >= numel) {
        found[place] = trivial(wide, numel, rank);
      } else {
        wanted.push_back({task, rank});
        places.push_back(place);
      }
    }
  }
  if (wanted.empty()) return found;
  if (numel > small) {
    const std::vector<std::optional<Threshold>> bracketed = bracketed_thresholds(deltas, numel, wanted, wide, room, parallel);
    for (size_t i = 0; i < wanted.size(); ++i) {
      found[places[i]] =
          bracketed[i] ? *bracketed[i] : exact_threshold(wide, deltas[wanted[i].task], numel, wanted[i].rank, room, parallel);
    }
    return found;
  }
  parallel(tasks, [&](int64_t task) {
    Threshold* out = found.data() + task * cuts;
    if (wide) {
      small_thresholds<int64_t>(deltas[task], numel, ranks + task * cuts, cuts, out);
    } else {
      small_thresholds<int32_t>(deltas[task], numel, ranks + task * cuts, cuts, out);
    }
  });
  return found;
}

ThresholdMemory threshold_memory(int64_t numel, int64_t wanted, int cuts, bool wide, int64_t room) {
  const int64_t width = wide ? 8 : 4;
  if (numel <= small) return {numel * width, numel * width, 0};
  const int64_t brackets = std::min(room, most_bracket_room(numel, wanted, wide));
  const int64_t histograms = histogram_bytes + histogram_memory(numel, room - histogram_bytes);
  const int64_t ties = chunk_count(numel, threshold_chunk) * static_cast<int64_t>(sizeof(int64_t));
  return {(threshold_chunk + vector_room) * cuts * width, 0, std::max(brackets, histograms) + ties};
}

Threshold exact_magnitude_threshold(const Delta& delta, int64_t numel, int64_t rank, bool wide, const ParallelFor& parallel) {
  if (rank < numel) return magnitude_thresholds(&delta, 1, numel, &rank, 1, wide, default_room, parallel).front();
  return exact_threshold(wide, delta, numel, rank, default_room, parallel);
}

void add_magnitude_histogram(const Delta& delta, bool wide, int64_t numel, int shift, int64_t prefix, int64_t* counts, int64_t room,
                             const ParallelFor& parallel) {
  const int64_t chunks = chunk_count(numel, threshold_chunk);
  const int64_t parts = histogram_parts(numel, room);
  auto count = [&](int64_t first, int64_t step, int64_t* to) {
    for (int64_t c = first; c < chunks; c += step) {
      const ChunkRange range = chunk_range(c, numel);
      threshold_loops().histogram(wide, delta, range.begin, range.length, shift, prefix, to);
    }
  };
  if (parts == 0) return count(0, 1, counts);
  // Integers: the order of the additions does not show.
  const PageBuffer partial(parts * histogram_bytes);
  auto* all = reinterpret_cast<int64_t*>(partial.data());
  parallel(parts, [&](int64_t part) { count(part, parts, all + part * histogram_bins); });
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t bin = 0; bin < histogram_bins; ++bin) counts[bin] += all[part * histogram_bins + bin];
  }
}

int64_t histogram_memory(int64_t numel, int64_t room) { return histogram_parts(numel, room) * histogram_bytes; }

std::vector<Threshold> joint_magnitude_thresholds(const std::vector<DeltaSegment>& segments, const std::vector<int64_t>& ranks,
                                                  std::vector<int64_t>* tie_ends, const ParallelFor& parallel, bool wide, int64_t room) {
  int64_t total = 0;
  for (const DeltaSegment& segment : segments) {
    wide = wide || is_wide(segment.delta);
    total += segment.numel;
  }
  const size_t count = segments.size();
  tie_ends->assign(ranks.size() * count, 0);
  std::vector<Threshold> found;
  for (size_t r = 0; r < ranks.size(); ++r) {
    int64_t* ends = tie_ends->data() + r * count;
    if (ranks[r] <= 0 || ranks[r] >= total) {
      found.push_back(trivial(wide, total, ranks[r]));
      std::fill(ends, ends + count, found.back().cut.tie_end);
      continue;
    }
    found.push_back(by_histograms(wide, ranks[r], [&](int shift, int64_t prefix, int64_t* counts) {
      for (const DeltaSegment& segment : segments) {
        add_magnitude_histogram(segment.delta, wide, segment.numel, shift, prefix, counts, room - histogram_bytes, parallel);
      }
    }));
    const Threshold& threshold = found.back();
    int64_t left = threshold.equal_kept;
    if (left == threshold.equal) {
      std::fill(ends, ends + count, INT64_MAX);
      continue;
    }
    for (size_t s = 0; s < count && left > 0; ++s) {
      const DeltaSegment& segment = segments[s];
      const std::vector<int64_t> equal = equal_per_chunk(wide, segment.delta, segment.numel, threshold.cut.bits, parallel);
      int64_t here = 0;
      for (const int64_t value : equal) here += value;
      if (here <= left) {
        ends[s] = INT64_MAX;
      } else {
        ends[s] = locate_tie(wide, segment.delta, segment.numel, threshold.cut.bits, left,
                             [&](int64_t c) { return equal[static_cast<size_t>(c)]; });
      }
      left -= std::min(left, here);
    }
  }
  return found;
}

namespace {

// Entries of one row's magnitudes above its cut, and equal to it.
template <class Bits>
Threshold counted_row_threshold(const Bits* bits, int64_t n, int64_t rank, Bits* scratch) {
  constexpr bool wide = sizeof(Bits) == 8;
  if (rank == 0) return trivial(wide, n, 0);
  Cut cut = threshold_loops().row_cut(wide, bits, n, rank, scratch);
  if (rank == n) cut.bits = *std::min_element(bits, bits + n);
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < n; ++i) {
    above += bits[i] > cut.bits;
    equal += bits[i] == cut.bits;
  }
  return {cut, above, equal, rank - above};
}

template <class Bits>
void row_thresholds(const Delta& delta, int64_t begin, int64_t n, const int64_t* ranks, int cuts, Threshold* found) {
  constexpr bool wide = sizeof(Bits) == 8;
  const ThreadScratch scratch(ScratchUse::magnitudes, 2 * n * static_cast<int64_t>(sizeof(Bits)));
  Bits* bits = scratch.as<Bits>();
  threshold_loops().magnitudes(wide, delta, begin, n, bits);
  for (int i = 0; i < cuts; ++i) found[i] = counted_row_threshold(bits, n, ranks[i], bits + n);
}

}  // namespace

std::vector<Threshold> row_magnitude_thresholds(const Delta& delta, int64_t rows, int64_t row_length, const int64_t* ranks, int cuts,
                                                bool wide, const ParallelFor& parallel) {
  std::vector<Threshold> found(static_cast<size_t>(rows * cuts));
  const int64_t group = std::max<int64_t>(1, threshold_chunk / std::max<int64_t>(1, row_length));
  parallel(chunk_count(rows, group), [&](int64_t index) {
    for (int64_t row = index * group; row < std::min(rows, (index + 1) * group); ++row) {
      Threshold* out = found.data() + row * cuts;
      if (wide) {
        row_thresholds<int64_t>(delta, row * row_length, row_length, ranks, cuts, out);
      } else {
        row_thresholds<int32_t>(delta, row * row_length, row_length, ranks, cuts, out);
      }
    }
  });
  return found;
}

Cut cut_of_threshold(const Delta& delta, int64_t numel, int64_t bits, int64_t equal_kept, bool wide, const ParallelFor& parallel) {
  if (equal_kept <= 0) return {bits, 0};
  const std::vector<int64_t> equal = equal_per_chunk(wide, delta, numel, bits, parallel);
  int64_t total = 0;
  for (const int64_t value : equal) total += value;
  if (equal_kept >= total) return {bits, INT64_MAX};
  return {bits, locate_tie(wide, delta, numel, bits, equal_kept, [&](int64_t c) { return equal[static_cast<size_t>(c)]; })};
}

}  // namespace taskloom
